"""A fresh process for each series: load, check, warm up, time. One JSON request on standard input, JSON lines back.

Standard output is moved away before a runtime is loaded, so whatever a runtime prints goes to standard error and cannot
spoil the protocol. Standard input stays open until the server ends the worker; when it closes, the server is gone and the
worker ends at once instead of heating the board for nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

from device_agents import measure, wire
from device_agents.clock import utc_now
from device_agents.codec import number, text
from device_agents.errors import Refused, printable
from device_agents.pixels import batches, load_images, parse_npy, prepare
from device_agents.runtimes import check_scheme, infer, load_backend
from device_agents.store import Store

KINDS = ("prove", "golden", "series", "accuracy", "predict", "profile")
EXIT_SERVER_GONE = 70
WINDOW_S = 1.0


@dataclass(frozen=True)
class WorkRequest:
    """What a worker is to do. ``prove`` needs a runtime, the others a variant of an installed, verified bundle."""

    kind: str = text(choices=KINDS)
    root: str = text(max_len=4096)
    runtime: str = text(choices=wire.RUNTIMES, default="onnxruntime")
    provider: str = text(max_len=120, default="")
    variant: Optional[wire.Variant] = None
    artifact: Optional[wire.Artifact] = None
    preprocessing: Optional[wire.Preprocessing] = None
    golden: Optional[wire.GoldenInputs] = None
    evaluation: Optional[wire.EvaluationSet] = None
    labels: Optional[wire.Blob] = None
    plan: Optional[wire.RunPlan] = None
    process: int = number(0, 100_000, default=0)
    count: int = number(0, 1_000_000, default=0)
    bytes: int = number(0, wire.MAX_BLOB_BYTES, default=0)


Say = Callable[[Dict[str, Any]], None]


def serve_request() -> int:
    """Read the request, do it, end. Exit status 0 after a ``result``, 10 after a ``refusal``."""
    out = os.dup(1)
    os.dup2(2, 1)
    die_first()

    def say(message: Dict[str, Any]) -> None:
        data = memoryview(json.dumps(message, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n")
        while data:
            data = data[os.write(out, data) :]

    source = os.fdopen(os.dup(0), "rb")
    try:
        request = wire.loads(WorkRequest, source.readline(wire.MAX_MANIFEST_BYTES), "work", wire.MAX_MANIFEST_BYTES)
        pixels = source.read(request.bytes) if request.bytes else b""
        threading.Thread(target=_end_with_server, args=(source,), daemon=True).start()
        say({"type": "result", "value": _TASKS[request.kind](request, say, pixels)})
        return 0
    except Refused as e:
        say({"type": "refusal", "refusal": wire.encode(e.to_wire())})
        return 10
    except ModuleNotFoundError as e:
        if e.name != "numpy":
            raise
        refused = Refused("no-numpy", "numpy cannot be imported: {}".format(e), "edgevit target provision")
        say({"type": "refusal", "refusal": wire.encode(refused.to_wire())})
        return 10
    except (wire.WireError, MemoryError) as e:
        text = "out of memory" if isinstance(e, MemoryError) else str(e)
        say({"type": "refusal", "refusal": wire.encode(Refused("worker-failed", printable(text)).to_wire())})
        return 10


def _end_with_server(source: Any) -> None:
    source.read()
    os._exit(EXIT_SERVER_GONE)


# ---- tasks ----------------------------------------------------------------------------------------------------------


def _prove(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """One runtime's version, its compiled-in providers, and whether ``provider`` (or the first of the CPU) really works."""
    backend = load_backend(request.runtime)
    import numpy

    try:
        backend.prove(request.provider)
        proof = {"proven": True, "detail": ""}
    except Refused as e:
        proof = {"proven": False, "detail": str(e)[:4000]}
    return {
        "version": backend.version(),
        "numpy": str(numpy.__version__),
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "providers": list(backend.providers()),
        "proof": proof,
    }


@dataclass(frozen=True)
class _Loaded:
    run: Callable[[Any], Any]
    provider: str
    version: str
    init_time_ns: int
    engine_cache: str
    memory_before_mb: Optional[float]
    memory_after_mb: Optional[float]


def _load(request: WorkRequest) -> _Loaded:
    """Import the runtime, then time reading and loading the model alone."""
    variant, artifact = _need(request.variant), _need(request.artifact)
    check_scheme(variant.runtime, artifact.scheme)
    backend = load_backend(variant.runtime)
    version = backend.version()
    store = Store(Path(request.root))
    backend.check(store.read_blob(artifact.blob))  # looks into the file, which is not part of loading it
    before = measure.resident_mb()
    start = time.perf_counter_ns()
    session = backend.load(
        store.read_blob(artifact.blob), variant.provider, variant.threads, artifact, store.engines_folder(artifact.blob.sha256)
    )
    init_time = time.perf_counter_ns() - start
    if session.provider != variant.provider:
        raise Refused("provider-mismatch", "asked for {}, got {}".format(variant.provider, session.provider))
    return _Loaded(session.run, session.provider, version, init_time, session.engine_cache, before, measure.resident_mb())


def _need(value: Any) -> Any:
    if value is None:
        raise Refused("worker-failed", "the request lacks a part that this kind of work needs")
    return value


@dataclass(frozen=True)
class _Checked:
    """A loaded artifact that gave its golden outputs; ``x`` is the input of its first golden images."""

    loaded: _Loaded
    x: Any
    first_ns: int
    result: wire.GoldenResult


def _load_and_check(request: WorkRequest) -> _Checked:
    """Load the artifact and run its golden images, the very first of them timed. Raises ``golden-mismatch``."""
    import numpy as np

    from device_agents.golden import compare

    store, artifact = Store(Path(request.root)), _need(request.artifact)
    golden, preprocessing = _need(request.golden), _need(request.preprocessing)
    recorded = parse_npy(store.read_blob(artifact.golden.blob), "the golden outputs")
    pick = [index for index, _ in batches(golden.count, artifact.batch)]

    def part(index: Any) -> Any:
        # One batch at a time, mapped anew and let go: what all golden images need is no part of the model's memory.
        images = load_images(store, golden.blob, golden.count, preprocessing, "the golden images")
        return prepare(np.asarray(images[index]), preprocessing, artifact.input)

    x = part(pick[0])
    loaded = _load(request)
    start = time.perf_counter_ns()
    first = infer(loaded.run, x)
    first_ns = time.perf_counter_ns() - start
    outputs = [first] + [infer(loaded.run, part(index)) for index in pick[1:]]
    flat = np.concatenate([np.asarray(o, np.float32).reshape(artifact.batch, -1) for o in outputs])[: golden.count]
    result = compare(flat, recorded, artifact.golden.tolerance)
    if not result.passed:
        raise Refused(
            "golden-mismatch",
            "{} on {} {} does not give the outputs recorded when it was built: {}".format(
                artifact.name, _need(request.variant).runtime, loaded.version, result.reason
            ),
            "build the bundle again, or leave this runtime to other artifacts",
        )
    return _Checked(loaded, x, first_ns, result)


def die_first() -> None:
    """Where memory runs out the kernel ends this process rather than the board's services (proc(5), ``oom_score_adj``)."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("1000")


def keep_to(cpus: Tuple[int, ...]) -> None:
    """Run this process, and every thread it will start, on ``cpus`` alone; on all it may use where none is named.

    Raises ``bad-job`` where one of them is not there for this process.
    """
    if not cpus:
        return
    allowed = os.sched_getaffinity(0)
    if not set(cpus) <= allowed:
        raise Refused(
            "bad-job",
            "the plan keeps to the CPUs {}, this process may use {}".format(
                ", ".join(map(str, cpus)), ", ".join(map(str, sorted(allowed)))
            ),
            "edgevit bench --affinity {}-{}".format(min(allowed), max(allowed)),
        )
    os.sched_setaffinity(0, cpus)


def _golden(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """What is checked before a variant becomes the active one."""
    return dict(wire.encode(_load_and_check(request).result))


def _series(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """One series: see :class:`~device_agents.wire.Series`. Raises ``golden-mismatch`` before anything is timed."""
    plan = _need(request.plan)
    keep_to(plan.affinity)
    started_at = utc_now()
    checked = _load_and_check(request)
    loaded, x = checked.loaded, checked.x
    began = time.monotonic()

    def alive(calls: int) -> None:
        say({"type": "progress", "done": calls, "seconds": time.monotonic() - began})

    warm = measure.warm_up(loaded.run, x, plan, alive)
    say({"type": "timing-begins"})
    began = time.monotonic()
    begin = measure.read_moment()
    timed = measure.time_calls(
        loaded.run,
        x,
        plan.min_samples,
        plan.min_seconds,
        plan.max_seconds,
        alive,
        plan.max_raw_samples,
        WINDOW_S if plan.sustained else 0.0,
    )
    between = measure.compare_moments(begin, measure.read_moment())
    say({"type": "timing-ends"})
    after = measure.resident_mb()
    series = wire.Series(
        process=request.process,
        started_at=started_at,
        init_time_ns=loaded.init_time_ns,
        engine_cache=loaded.engine_cache,
        first_inference_ns=checked.first_ns,
        warmup_ns=warm,
        samples_ns=timed.samples_ns,
        provider=loaded.provider,
        runtime_version=loaded.version,
        golden=checked.result,
        memory_before_mb=loaded.memory_before_mb,
        memory_init_delta_mb=_minus(loaded.memory_after_mb, loaded.memory_before_mb),
        memory_delta_mb=_minus(after, loaded.memory_before_mb),
        peak_memory_mb=measure.peak_mb(),
        own_cpu=between.own_cpu,
        foreign_cpu=between.foreign_cpu,
        swapped_pages=between.swapped_pages,
        clock_step_ms=between.clock_step_ms,
        readings=(),
        waiting=between.waiting,
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        stride=timed.stride,
        windows=timed.windows,
    )
    return dict(wire.encode(series))


def _minus(a: Optional[float], b: Optional[float]) -> Optional[float]:
    return None if a is None or b is None else a - b


def _profile(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """One :class:`~device_agents.wire.OperatorProfile`. Raises ``no-profiler`` where the runtime offers none."""
    plan, variant, artifact = _need(request.plan), _need(request.variant), _need(request.artifact)
    keep_to(plan.affinity)
    backend = load_backend(variant.runtime)
    profiled = getattr(backend, "profile", None)
    if profiled is None:
        raise Refused(
            "no-profiler", "{} {} offers no profiler of operators from Python".format(variant.runtime, backend.version())
        )
    store = Store(Path(request.root))
    x = _first_input(request, store)
    engines = store.engines_folder(artifact.blob.sha256)
    with store.scratch() as folder:
        found = profiled(store.read_blob(artifact.blob), variant.provider, variant.threads, artifact, x, folder, engines)
    return dict(wire.encode(found))


def _first_input(request: WorkRequest, store: Store) -> Any:
    """The input that a series times: the first golden images."""
    import numpy as np

    artifact, golden, preprocessing = _need(request.artifact), _need(request.golden), _need(request.preprocessing)
    images = load_images(store, golden.blob, golden.count, preprocessing, "the golden images")
    index = next(iter(batches(golden.count, artifact.batch)))[0]
    return prepare(np.asarray(images[index]), preprocessing, artifact.input)


def _outputs(request: WorkRequest, images: Any, say: Say, stage: str) -> Any:
    """float32 (images, classes) for uint8 images, batch by batch."""
    import numpy as np

    artifact, preprocessing = _need(request.artifact), _need(request.preprocessing)
    loaded = _load(request)
    found, said, count = [], time.monotonic(), int(images.shape[0])
    for index, real in batches(count, artifact.batch):
        out = infer(loaded.run, prepare(np.asarray(images[index]), preprocessing, artifact.input))
        found.append(np.asarray(out, np.float32).reshape(artifact.batch, -1)[:real])
        if time.monotonic() - said >= 0.5:
            said = time.monotonic()
            done = int(index[0]) + real
            say({"type": "progress", "stage": stage, "done": done, "total": count, "unit": "images", "text": artifact.name})
    outputs = np.concatenate(found)
    bad = int((~np.isfinite(outputs)).any(axis=1).sum())
    if bad:  # the largest of a row with a NaN is the NaN, which may count as a right answer
        raise Refused("worker-failed", "the outputs are not a number or infinite in {} of {} images".format(bad, count))
    return outputs


def _accuracy(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """Predicted and true class of every evaluation image."""
    evaluation = _need(request.evaluation)
    store = Store(Path(request.root))
    images = load_images(store, evaluation.images, evaluation.count, _need(request.preprocessing), "the evaluation images")
    labels = parse_npy(store.read_blob(evaluation.labels), "the evaluation labels")
    if labels.shape != (evaluation.count,) or labels.dtype.kind not in "iu":
        raise Refused(
            "blob-damaged",
            "evaluation labels: {} of shape {}, expected int64 ({},)".format(labels.dtype, labels.shape, evaluation.count),
        )
    predictions = _outputs(request, images, say, "accuracy").argmax(axis=1)
    return {
        "predictions": [int(p) for p in predictions],
        "labels": [int(c) for c in labels],
        "correct": int((predictions == labels).sum()),
    }


def _predict(request: WorkRequest, say: Say, pixels: bytes) -> Dict[str, Any]:
    """The five likeliest classes of each image that came with the request."""
    import numpy as np

    from device_agents.answers import parse_label_names, rank_classes

    preprocessing = _need(request.preprocessing)
    images = parse_npy(pixels, "the images sent")
    expected: Tuple[int, ...] = (request.count, preprocessing.height, preprocessing.width, 3)
    if images.dtype != np.uint8 or images.shape != expected:
        raise Refused(
            "bad-request", "got {} of shape {}, expected uint8 of shape {}".format(images.dtype, images.shape, expected)
        )
    names: Tuple[str, ...] = ()
    if request.labels is not None:
        names = parse_label_names(Store(Path(request.root)).read_blob(request.labels))
    return {"predictions": rank_classes(_outputs(request, images, say, "predict"), names, 5)}


_TASKS: Dict[str, Callable[[WorkRequest, Say, bytes], Dict[str, Any]]] = {
    "prove": _prove,
    "golden": _golden,
    "series": _series,
    "accuracy": _accuracy,
    "predict": _predict,
    "profile": _profile,
}
