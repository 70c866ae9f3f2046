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
    waiting=0.0,
    affinity=(0, 1, 2, 3),
)


def readings(*frequencies: float, throttle: tuple[str, ...] = ()) -> tuple[wire.Reading, ...]:
    return tuple(wire.Reading(i * 1000, 50.0, f, throttle) for i, f in enumerate(frequencies))


def cooled(outcome: str, at_c: float | None) -> wire.Cooling:
    return wire.Cooling(outcome, at_c, None if at_c is None else 45.0, at_c, 300.0)


def verdict(
    governor: str | None = "performance",
    cpu_count: int = 4,
    failure: wire.Refusal | None = None,
    series: Any = None,
    plan: wire.RunPlan = PLAN,
    **change: Any,
) -> wire.Verdict:
    measured = (dataclasses.replace(SERIES, **change),) if series is None else series
    m = wire.Measurement(VARIANT, "m", "fp32", "b", "onnx", "fp32", "0" * 64, 1, 1, measured, None, "not asked", failure)
    return judge(_run(m, governor, cpu_count, plan), m)


def _run(m: wire.Measurement, governor: str | None = "performance", cpu_count: int = 4, plan: wire.RunPlan = PLAN) -> wire.Run:
    job = wire.Job(wire.JOB_SCHEMA, "r", "b", "t", "now", "me", plan, (VARIANT,), 60.0)
    facts = wire.Facts(
        schema=wire.FACTS_SCHEMA, agent_version=1, agent_sha256="", hostname="h", board_model=None, os_name=None,
        kernel="6", machine="aarch64", cpu_model=None, cpu_count=cpu_count, cpu_features=(), python="3.11.2",
        runtime_python=None, libc=None, jetpack=None, memory_mb=None, disk_free_mb=1, clock_utc="now", boot_id=None,
        numpy=None, runtimes=(), sensors=(), ssh_keygen=None, signers=0, bundles=(), active=None, waiting_runs=(),
        absent={},
    )  # fmt: skip
    return wire.Run(wire.RUN_SCHEMA, job, "completed", "", 1, "a", "b", facts, governor, (m,))


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
    "crowded single core": ({"foreign_cpu": 0.3, "affinity": (2,)}, "0.30 of 1"),
    "crowded, by the board's cores": ({"foreign_cpu": 0.3, "cpu_count": 1, "affinity": ()}, "0.30 of 1"),
    "made to wait": ({"waiting": 0.12}, "waited for a CPU 12% of the time"),
    "under-voltage": ({"readings": readings(1800.0, throttle=("under-voltage",))}, "under-voltage"),
    "over-current": ({"readings": readings(1800.0, throttle=("over-current-oc3",))}, "over-current-oc3"),
    "slower in its second half": ({"readings": readings(1800.0, 1800.0, 1500.0, 1500.0)}, "1800 to 1500 MHz"),
    "faster in its second half": ({"readings": readings(600.0, 600.0, 1500.0, 1500.0)}, "600 to 1500 MHz"),
    "other clocks in other series": (
        {"series": (SERIES, dataclasses.replace(SERIES, process=1, readings=readings(1200.0)))},
        "between its series the CPU went from 1800 to 1200 MHz",
    ),
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
    "fewer than planned": (
        {"samples_ns": (5_000_000,) * 63},
        "63 of 64 samples before the time was up; edgevit bench --plan sustained",
    ),
    "others at work": ({"foreign_cpu": 0.2}, "cores busy"),
    "made to wait a little": ({"waiting": 0.04}, "waited for a CPU up to 4% of the time"),
    "governor": ({"governor": "ondemand"}, "edgevit bench --tune-system"),
    "not cool": ({"cooling": cooled("limit", 61.0)}, "61.0 °C instead of 45.0 °C after 300 s"),
    "cannot be cooled by reading": ({"cooling": cooled("no-sensor", None)}, "no temperature"),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned_yet_valid(name: str) -> None:
    change, words = WARNED[name]
    found = verdict(**change)
    assert found.valid and words in " ".join(found.warnings), found


def test_what_was_not_read_is_not_judged() -> None:
    found = verdict(governor=None, foreign_cpu=None, swapped_pages=None, waiting=None, readings=(), affinity=())
    assert found.valid and found.warnings == ()


def test_every_warning_names_the_next_command() -> None:
    for name, (change, _) in WARNED.items():
        for text in verdict(**change).warnings:
            assert "edgevit " in text or "build with --batch" in text, (name, text)


def test_limits_are_the_plans() -> None:
    wide = dataclasses.replace(PLAN, max_waiting=0.5, max_foreign_cpu=1.0, max_frequency_drift=0.5)
    change: dict[str, Any] = {
        "waiting": 0.4, "foreign_cpu": 3.9, "readings": readings(1800.0, 1800.0, 1000.0, 1000.0)
    }  # fmt: skip
    assert verdict(plan=wide, **change).valid and not verdict(**change).valid


def test_waiting_is_a_share_of_each_timed_thread() -> None:
    four = dataclasses.replace(VARIANT, threads=4)
    m = wire.Measurement(
        four, "m", "fp32", "b", "onnx", "fp32", "0" * 64, 1, 1, (dataclasses.replace(SERIES, waiting=0.3),), None, "", None
    )
    assert judge(_run(m), m).valid
    m = dataclasses.replace(m, series=(dataclasses.replace(SERIES, waiting=0.5),))
    assert not judge(_run(m), m).valid


def test_of_a_sustained_plan_heat_is_the_finding_and_weak_power_is_not() -> None:
    sustained = dataclasses.replace(PLAN, name="sustained", sustained=True)
    hot = readings(1800.0, 1800.0, 900.0, 900.0, throttle=("throttled", "frequency-capped"))
    assert not verdict(readings=hot).valid
    found = verdict(plan=sustained, readings=hot)
    assert found.valid and "heat limited the board" in " ".join(found.warnings)
    assert not verdict(plan=sustained, readings=readings(1800.0, throttle=("under-voltage",))).valid
    assert not verdict(plan=sustained, waiting=0.5).valid


def test_a_few_samples_are_neither_invalid_nor_a_warning_of_their_own() -> None:
    few = dataclasses.replace(PLAN, min_samples=3)
    assert verdict(plan=few, samples_ns=(5_000_000,) * 3) == wire.Verdict(RULES_VERSION, True, (), ())


def test_twenty_series_warn_once() -> None:
    many = tuple(dataclasses.replace(SERIES, process=i, foreign_cpu=0.2 + i / 100, waiting=0.03 + i / 1000) for i in range(20))
    assert len(verdict(series=many).warnings) == 2


def test_a_sticky_throttle_of_the_past_is_no_reading() -> None:
    from device_agents.boards.raspberry_pi import parse_throttled

    assert verdict(readings=(wire.Reading(0, 50.0, 1800.0, parse_throttled("throttled=0x50000")),)).valid


def test_a_run_stored_before_these_rules_is_judged_by_them() -> None:
    """What older agents never wrote down is absent, not wrong."""
    newer = {
        "series": ("waiting", "affinity", "stride", "windows", "cooling", "sampling", "power", "power_absent"),
        "measurements": ("profile", "profile_absent"),
    }
    m = wire.Measurement(
        VARIANT, "m", "fp32", "b", "onnx", "fp32", "0" * 64, 1, 1, (SERIES,), None, "not asked", None
    )  # fmt: skip
    document = wire.encode(_run(m))
    (measurement,) = document["measurements"]
    (series,) = measurement["series"]
    for name in newer["series"]:
        series.pop(name, None)
    for name in newer["measurements"]:
        measurement.pop(name)
    kept = ("name", "processes", "warmup_iterations", "warmup_seconds", "min_samples", "min_seconds", "max_seconds", "accuracy")
    document["job"]["plan"] = {name: document["job"]["plan"][name] for name in kept}
    document["job"].pop("memory_limit_mb")
    document.pop("governor_before")
    old = wire.decode(wire.Run, document, "run")
    assert judge(old, old.measurements[0]) == wire.Verdict(RULES_VERSION, True, (), ())
