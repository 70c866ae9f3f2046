"""Builders of realistic runs, seeded: what a device would have measured, without a device."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any

from device_agents.wire import (
    FACTS_SCHEMA,
    JOB_SCHEMA,
    RUN_SCHEMA,
    RUNTIMES_OF_FORMAT,
    Accuracy,
    Facts,
    GoldenResult,
    Job,
    Measurement,
    ProviderFact,
    Reading,
    Refusal,
    Run,
    RunPlan,
    RuntimeFact,
    Series,
    Variant,
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def facts(target: str = "pi4", **changes: Any) -> Facts:
    """A Raspberry Pi 4 with both runtimes proven."""
    made = Facts(
        schema=FACTS_SCHEMA,
        agent_version=1,
        agent_sha256=sha("agent"),
        hostname=target,
        board_model="Raspberry Pi 4 Model B Rev 1.4",
        os_name="Debian GNU/Linux 12 (bookworm)",
        kernel="6.6.31+rpt-rpi-v8",
        machine="aarch64",
        cpu_model="Cortex-A72",
        cpu_count=4,
        cpu_features=("fp", "asimd", "evtstrm", "crc32", "cpuid"),
        python="3.11.2",
        runtime_python="3.11.2",
        libc="glibc 2.36",
        jetpack=None,
        memory_mb=3793,
        disk_free_mb=20_000,
        clock_utc="2025-01-15T10:00:00Z",
        boot_id=None,
        numpy="2.2.0",
        runtimes=(
            RuntimeFact("onnxruntime", "1.31.1", (ProviderFact("CPUExecutionProvider", True),)),
            RuntimeFact("litert", "2.3.0", (ProviderFact("XNNPACK", True),)),
        ),
        sensors=("temperature", "frequency", "throttle"),
        ssh_keygen="OpenSSH_9.2p1",
        signers=1,
        bundles=(),
        active=None,
        waiting_runs=(),
        absent={"boot_id": "not readable", "jetpack": "not a Jetson"},
    )
    return dataclasses.replace(made, **changes)


def plan(**changes: Any) -> RunPlan:
    made = RunPlan(
        name="standard",
        processes=3,
        warmup_iterations=5,
        warmup_seconds=0.5,
        min_samples=64,
        min_seconds=2.0,
        max_seconds=60.0,
        accuracy=True,
    )
    return dataclasses.replace(made, **changes)


def series(process: int, p50_ms: float, samples: int, rng: random.Random, **changes: Any) -> Series:
    """One worker: log-normal around ``p50_ms`` with a tail, as latencies are."""
    scale = p50_ms * 1e6 * rng.uniform(0.99, 1.01)
    times = tuple(int(scale * rng.lognormvariate(0.0, 0.02) * (1.3 if rng.random() < 0.03 else 1.0)) for _ in range(samples))
    made = Series(
        process=process,
        started_at=f"2025-01-15T10:0{process % 10}:00Z",
        init_time_ns=int(scale * 8),
        first_inference_ns=int(scale * 2.5),
        warmup_ns=tuple(int(scale * 1.1) for _ in range(5)),
        samples_ns=times,
        provider="CPUExecutionProvider",
        runtime_version="1.31.1",
        golden=GoldenResult(True, 16, 1e-6, 0.99999, 0, ""),
        memory_before_mb=30.0,
        memory_init_delta_mb=40.0,
        memory_delta_mb=55.0,
        peak_memory_mb=92.5,
        own_cpu=0.99,
        foreign_cpu=0.02,
        swapped_pages=0,
        clock_step_ms=0.0,
        readings=tuple(Reading(i * 1000, 52.0 + i * 0.4, 1800.0, ()) for i in range(4)),
    )
    return dataclasses.replace(made, **changes)


def accuracy(correct: int, images: int, rng: random.Random, like: Accuracy | None = None, flips: int = 0) -> Accuracy:
    """``correct`` of ``images`` right; ``like``: the same predictions but ``flips`` of them wrong or put right."""
    labels = tuple(i % 10 for i in range(images))
    if like is not None:
        predictions = list(like.predictions)
        for i in rng.sample(range(images), flips):
            predictions[i] = (predictions[i] + 1) % 10
        correct = sum(p == y for p, y in zip(predictions, like.labels, strict=True))
        return Accuracy(images, correct, tuple(predictions), like.labels, like.evaluation, False)
    wrong = set(rng.sample(range(images), images - correct))
    return Accuracy(
        images, correct, tuple((y + 1) % 10 if i in wrong else y for i, y in enumerate(labels)), labels, "digits", False
    )


def measurement(
    recipe: str = "fp32",
    format: str = "onnx",
    p50_ms: float = 50.0,
    samples: int = 300,
    processes: int = 3,
    seed: int = 1,
    **changes: Any,
) -> Measurement:
    """One variant, measured in ``processes`` workers of ``samples`` each."""
    rng = random.Random(seed)
    runtime = RUNTIMES_OF_FORMAT[format][0]
    provider = "CPUExecutionProvider" if runtime == "onnxruntime" else "XNNPACK"
    version = "1.31.1" if runtime == "onnxruntime" else "2.3.0"
    name = f"{recipe}-{format}"
    made = Measurement(
        variant=Variant(sha(f"bundle-{recipe}"), name, runtime, provider, 4),
        model="deit_tiny_patch16_224",
        recipe=recipe,
        bundle_name=f"deit-tiny-{recipe}",
        format=format,
        scheme=recipe if recipe in ("fp32", "fp16", "int8-dynamic", "int8-static") else "fp32",
        artifact_sha256=sha(name),
        artifact_bytes=23_000_000 if recipe == "fp32" else 6_300_000,
        batch=1,
        series=tuple(
            series(i, p50_ms, samples, rng, provider=provider, runtime_version=version) for i in range(processes) if samples
        ),
        accuracy=accuracy(530, 650, random.Random(7)),
        accuracy_absent="",
        failure=None,
    )
    return dataclasses.replace(made, **changes)


def failed(recipe: str = "int8-static", format: str = "onnx", code: str = "golden-mismatch", **changes: Any) -> Measurement:
    """A variant the device would not time."""
    why = Refusal(code, "golden image 3: cosine 0.61, expected at least 0.98", "edgevit explain")
    return measurement(
        recipe, format, samples=0, **{"accuracy": None, "accuracy_absent": "not scored: it failed", "failure": why, **changes}
    )


def run(target: str = "pi4", batch: str = "b1", run_id: str | None = None, measurements: Any = None, **changes: Any) -> Run:
    """A completed run of four variants on ``target``."""
    if measurements is None:
        base = accuracy(530, 650, random.Random(7))
        rng = random.Random(11)
        measurements = (
            measurement("fp32", "onnx", 52.0, seed=1, accuracy=base),
            measurement("fp32", "tflite", 44.0, seed=2, accuracy=accuracy(0, 650, rng, base, 1)),
            measurement("int8-dynamic", "onnx", 31.0, seed=3, accuracy=accuracy(0, 650, rng, base, 9)),
            measurement("int8-dynamic", "tflite", 21.0, seed=4, accuracy=accuracy(0, 650, rng, base, 7)),
        )
    here = facts(target)
    job = Job(
        schema=JOB_SCHEMA,
        run_id=run_id or f"{batch}-{target}",
        batch_id=batch,
        target=target,
        submitted_at="2025-01-15T10:00:00Z",
        submitted_by="someone@desk",
        plan=plan(),
        variants=tuple(m.variant for m in measurements),
        timeout_seconds=3600.0,
    )
    made = Run(
        schema=RUN_SCHEMA,
        job=job,
        status="completed",
        reason="",
        attempt=1,
        started_at="2025-01-15T10:00:05Z",
        ended_at="2025-01-15T10:04:00Z",
        facts=here,
        governor="ondemand",
        measurements=tuple(measurements),
    )
    return dataclasses.replace(made, **changes)
