"""Recorded facts → VALID, INVALID or a warning; each rule by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from device_agents import wire
from device_agents.verdict import RULES_VERSION, judge

PLAN = wire.RunPlan("standard", 1, 0, 0.0, 64, 0.0, 60.0, False)
VARIANT = wire.Variant("0" * 64, "a", "onnxruntime", "CPUExecutionProvider", 1)
GOLDEN = wire.GoldenResult(True, 16, 0.0, 1.0, 0, "")
SERIES = wire.Series(
    process=0,
    started_at="now",
    init_time_ns=1,
    first_inference_ns=1,
    warmup_ns=(),
    samples_ns=tuple(5_000_000 + n for n in range(64)),
    provider="CPUExecutionProvider",
    runtime_version="1",
    golden=GOLDEN,
    memory_before_mb=1.0,
    memory_init_delta_mb=1.0,
    memory_delta_mb=1.0,
    peak_memory_mb=2.0,
    own_cpu=1.0,
    foreign_cpu=0.01,
    swapped_pages=0,
    clock_step_ms=0.0,
    readings=(wire.Reading(0, 50.0, 1800.0, ()),),
)


def verdict(
    governor: str | None = "performance",
    cpu_count: int = 4,
    failure: wire.Refusal | None = None,
    series: Any = None,
    **change: Any,
) -> wire.Verdict:
    measured = (dataclasses.replace(SERIES, **change),) if series is None else series
    m = wire.Measurement(VARIANT, "m", "fp32", "b", "onnx", "fp32", "0" * 64, 1, 1, measured, None, "not asked", failure)
    job = wire.Job(wire.JOB_SCHEMA, "r", "b", "t", "now", "me", PLAN, (VARIANT,), 60.0)
    facts = wire.Facts(
        schema=wire.FACTS_SCHEMA, agent_version=1, agent_sha256="", hostname="h", board_model=None, os_name=None,
        kernel="6", machine="aarch64", cpu_model=None, cpu_count=cpu_count, cpu_features=(), python="3.11.2",
        runtime_python=None, libc=None, jetpack=None, memory_mb=None, disk_free_mb=1, clock_utc="now", boot_id=None,
        numpy=None, runtimes=(), sensors=(), ssh_keygen=None, signers=0, bundles=(), active=None, waiting_runs=(),
        absent={},
    )  # fmt: skip
    return judge(wire.Run(wire.RUN_SCHEMA, job, "completed", "", 1, "a", "b", facts, governor, (m,)), m)


def test_a_clean_measurement_is_valid_without_a_warning() -> None:
    assert verdict() == wire.Verdict(RULES_VERSION, True, (), ())


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "failure": ({"failure": wire.Refusal("worker-died", "ended by SIGKILL")}, "SIGKILL"),
    "golden": ({"golden": dataclasses.replace(GOLDEN, passed=False, reason="cosine 0.1")}, "cosine 0.1"),
    "provider": ({"provider": "XNNPACK"}, "XNNPACK instead of CPUExecutionProvider"),
    "throttled": ({"readings": (wire.Reading(0, 85.0, 600.0, ("throttled",)),)}, "throttled"),
    "swapped": ({"swapped_pages": 12}, "12 pages"),
    "clock set back": ({"clock_step_ms": -5000.0}, "-5000 ms"),
    "crowded": ({"foreign_cpu": 3.3}, "3.30 of 4 cores"),
    "crowded single core": ({"foreign_cpu": 0.3, "cpu_count": 1}, "0.30 of 1"),
    "no samples": ({"samples_ns": ()}, "no samples"),
    "a series is missing": ({"series": ()}, "0 of 1 series"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name: str) -> None:
    change, words = INVALID[name]
    found = verdict(**change)
    assert not found.valid and words in " ".join(found.reasons), found


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "scattered": ({"samples_ns": (4_000_000, 6_000_000) * 32}, "standard deviation is 20%"),
    "an outlier": ({"samples_ns": (5_000_000,) * 127 + (9_000_000,)}, "extremes"),
    "very short": ({"samples_ns": (900_000,) * 64}, "less than 1 ms"),
    "few samples": ({"samples_ns": (5_000_000,) * 63}, "too few"),
    "fewer than planned": ({"samples_ns": (5_000_000,) * 63}, "63 of 64 samples"),
    "others at work": ({"foreign_cpu": 0.2}, "cores busy"),
    "governor": ({"governor": "ondemand"}, "ondemand"),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned_yet_valid(name: str) -> None:
    change, words = WARNED[name]
    found = verdict(**change)
    assert found.valid and words in " ".join(found.warnings), found


def test_what_was_not_read_is_not_judged() -> None:
    found = verdict(governor=None, foreign_cpu=None, swapped_pages=None, readings=())
    assert found.valid and found.warnings == ()


def test_a_sticky_throttle_of_the_past_is_no_reading() -> None:
    from device_agents.boards.raspberry_pi import parse_throttled

    assert verdict(readings=(wire.Reading(0, 50.0, 1800.0, parse_throttled("throttled=0x50000")),)).valid
