"""One run of a file in the oldest runtime its profiles allow, in an interpreter that has it.

Interpreters are looked up in the folder named by ``EDGEVIT_RUNTIMES``: ``<runtime>-<version>/bin/python``, such as
``onnxruntime-1.19.2/bin/python``. Where there is none the caller says so: absent is not checked.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents.wire import RUNTIMES_OF_FORMAT, CheckedRuntime
from edgevit.errors import ExportError
from edgevit.export.parity import cosines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevit.profile import Profile

RUNTIMES_VARIABLE = "EDGEVIT_RUNTIMES"
TIMEOUT_SECONDS = 300.0

# Parses under Python 3.8, needs numpy and one runtime. argv: runtime, model, inputs.npy, outputs.npy; prints versions.
_RUNNER = """
import platform, sys
import numpy as np
runtime, model, source, sink = sys.argv[1:5]
inputs = np.load(source)
if runtime == "onnxruntime":
    import onnxruntime
    version = onnxruntime.__version__
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: x})[0] for x in inputs]
else:
    if runtime == "litert":
        import ai_edge_litert
        from ai_edge_litert.interpreter import Interpreter
        package = "ai-edge-litert"
    else:
        from tflite_runtime.interpreter import Interpreter
        package = "tflite-runtime"
    import importlib.metadata
    version = importlib.metadata.version(package)
    interpreter = Interpreter(model_path=model, num_threads=2)
    interpreter.allocate_tensors()
    i, o = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    rows = []
    for x in inputs:
        interpreter.set_tensor(i, x)
        interpreter.invoke()
        rows.append(interpreter.get_tensor(o).copy())
np.save(sink, np.stack(rows).astype(np.float32))
print(version, platform.python_version())
"""


@dataclass(frozen=True)
class OldestCheck:
    """Runtimes in which the file really ran, the largest difference seen there, and what could not be run."""

    checked: tuple[CheckedRuntime, ...]
    notes: tuple[str, ...]


def oldest_runtimes(format_: str, scheme: str, profiles: Iterable[Profile]) -> tuple[tuple[str, str], ...]:
    """(runtime, oldest version) for each runtime of the profiles that reads ``format_`` and does not refuse ``scheme``."""
    oldest: dict[str, str] = {}
    for profile in profiles:
        for option in profile.runtimes:
            if option.runtime not in RUNTIMES_OF_FORMAT[format_] or scheme in option.refuses:
                continue
            known = oldest.get(option.runtime)
            if known is None or version_key(option.oldest) < version_key(known):
                oldest[option.runtime] = option.oldest
    return tuple(oldest.items())


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def find_interpreter(runtime: str, version: str) -> Path | None:
    """The interpreter that has exactly this runtime version (a version of two parts also finds its patch releases)."""
    place = os.environ.get(RUNTIMES_VARIABLE)
    if not place:
        return None
    root = Path(place)
    wanted = f"{runtime}-{version}"
    names = [d.name for d in root.iterdir()] if root.is_dir() else []
    for name in sorted(n for n in names if n == wanted or n.startswith(wanted + ".")):
        python = root / name / "bin" / "python"
        if python.exists():
            return python
    return None


def run_in_oldest(
    model: bytes, format_: str, wanted: Sequence[tuple[str, str]], batches: NDArray[Any], recorded: NDArray[np.float32]
) -> OldestCheck:
    """Run ``batches`` (count, *input shape) in each wanted runtime and compare with ``recorded`` (count × batch, classes).

    Raises :class:`ExportError` where the runtime refuses the file or dies of it; differences are the golden tolerance's matter.
    """
    import numpy as np

    checked, notes = [], []
    for runtime, version in wanted:
        python = find_interpreter(runtime, version)
        if python is None:
            notes.append(f"not run in {runtime} {version}, the oldest its profiles allow: no such interpreter here")
            continue
        outputs, real_version, python_version = _run(python, runtime, version, model, format_, batches)
        rows = outputs.reshape(-1, recorded.shape[1])[: len(recorded)]
        if not np.isfinite(rows).all():
            raise ExportError(f"{runtime} {real_version} gives NaN or infinity for the {format_} file")
        checked.append(
            CheckedRuntime(
                runtime=runtime,
                version=real_version,
                python=python_version,
                max_abs_error=float(np.abs(rows - recorded).max()),
                min_cosine=float(cosines(recorded, rows).min()),
            )
        )
    return OldestCheck(tuple(checked), tuple(notes))


def _run(
    python: Path, runtime: str, version: str, model: bytes, format_: str, batches: NDArray[Any]
) -> tuple[NDArray[np.float32], str, str]:
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="edgevit-oldest-") as scratch:
        file, source, sink = Path(scratch) / f"model.{format_}", Path(scratch) / "in.npy", Path(scratch) / "out.npy"
        file.write_bytes(model)
        np.save(source, batches)
        # -I: the environment of this process (its PYTHONPATH above all) is not the old interpreter's.
        argv = [str(python), "-I", "-c", _RUNNER, runtime, str(file), str(source), str(sink)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as e:
            raise ExportError(f"{runtime} {version} did not finish the golden images within {TIMEOUT_SECONDS:.0f} s") from e
        except OSError as e:
            raise ExportError(f"{python} could not be started: {e}") from e
        if done.returncode != 0 or not sink.is_file():
            tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ExportError(
                f"{runtime} {version}, the oldest its profiles allow, refuses the {format_} file: {tail[0][:400]}"
            )
        words = done.stdout.split()
        return np.load(sink), words[-2], words[-1]
