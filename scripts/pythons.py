"""One environment per Python that a device may have, holding what that Python really gets from the package registry.

    python scripts/pythons.py [3.8 3.12 …]

Interpreters are looked for as ``python3.X`` on PATH and under ``~/.pyenv/versions``. Environments lie in
``.cache/pythons/<version>``; a second run does nothing. What is missing is printed, and the exit status is then 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".cache" / "pythons"

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    # Pillow is the one optional extra on a device; its versions differ so that tests can hold them to the same pixels.
    # 3.8 never got LiteRT; tflite-runtime was built for numpy 1, though its metadata does not say so.
    "3.8": ("numpy<2", "onnxruntime==1.19.2", "tflite-runtime==2.14.0", "pillow==10.4.0"),
    "3.9": ("numpy<2.1", "onnxruntime==1.19.2", "ai-edge-litert==2.1.0", "pillow==11.3.0"),
    "3.10": ("numpy<2.3", "onnxruntime==1.23.2", "ai-edge-litert>=2.1,<2.4", "pillow>=12,<13"),
    "3.11": ("numpy>=1.26", "onnxruntime==1.31.1", "ai-edge-litert==2.3.0", "pillow>=13"),
    "3.12": ("numpy>=1.26", "onnxruntime==1.31.1", "ai-edge-litert==2.3.0", "pillow>=13"),
    "3.13": ("numpy>=1.26", "onnxruntime==1.31.1", "ai-edge-litert==2.3.0", "pillow>=13"),
}


def find_interpreter(version: str) -> Path | None:
    """A Python of this minor version that can really start, or None."""
    found = shutil.which(f"python{version}")
    candidates = [Path(found)] if found else []
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted((root / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    for candidate in candidates:
        # A pyenv shim exists for versions that are not enabled: only starting it tells.
        done = subprocess.run(
            [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def environment_python(version: str) -> Path:
    """Where the environment's interpreter lies, or will lie."""
    return CACHE / version / "bin" / "python"


def is_ready(version: str) -> bool:
    """Whether the environment is there with exactly the requirements of this file."""
    stamp = CACHE / version / "requirements.txt"
    return environment_python(version).exists() and stamp.exists() and stamp.read_text() == _stamp(version)


def make_environment(version: str) -> str:
    """Make one environment unless it is there; an empty text, or why it could not be made."""
    if is_ready(version):
        return ""
    interpreter = find_interpreter(version)
    if interpreter is None:
        return f"no python{version} on PATH or in ~/.pyenv/versions; for example: pyenv install {version}"
    folder = CACHE / version
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [str(interpreter), "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *REQUIREMENTS[version]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{' '.join(command[:4])} failed for Python {version}: {done.stderr.strip()[-600:]}"
    (folder / "requirements.txt").write_text(_stamp(version))
    return ""


def _stamp(version: str) -> str:
    return "\n".join(REQUIREMENTS[version]) + "\n"


def main(versions: list[str]) -> int:
    unknown = [v for v in versions if v not in REQUIREMENTS]
    for version in unknown:
        print(f"{version}: not one of {', '.join(REQUIREMENTS)}")
    known = [v for v in versions or list(REQUIREMENTS) if v in REQUIREMENTS]
    with ThreadPoolExecutor(3) as pool:  # each waits for downloads most of the time
        problems = list(pool.map(make_environment, known))
    for version, problem in zip(known, problems, strict=True):
        print(f"{version}: {problem or environment_python(version)}", flush=True)
    return int(bool(unknown) or any(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
