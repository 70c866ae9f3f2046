"""Device-to-device spread of one variant on devices of one profile, apart from the noise of measuring it. Pure.

A machine that two targets name (``local`` and its own sshd, two accounts) is one device: they share the kernel's boot id.
The estimate is :func:`edgevit.results.variance.variance_components` over the medians of the worker processes. Only VALID
measurements enter: noise of others is no property of a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.profile import propose_profile
from edgevit.results.variance import VarianceComponents, variance_components

if TYPE_CHECKING:
    from device_agents.wire import Run
    from edgevit.results.summary import Summary


@dataclass(frozen=True)
class DeviceSpread:
    """One variant on the devices of one ``profile``. ``found`` is None where fewer than two of them have a VALID figure;
    ``not_valid`` names the targets that have none."""

    profile: str
    model: str
    label: str
    runtime: str
    provider: str
    threads: int
    found: VarianceComponents | None
    not_valid: tuple[str, ...]


def device_spreads(runs: Sequence[Run], summaries: Sequence[Summary], batch: str = "") -> list[DeviceSpread]:
    """For each variant that was measured on two or more targets of one profile (in this ``batch`` where one is named), in the
    order they came. ``summaries`` are those of ``runs``; several runs of a target tell its run noise from its difference to
    others."""
    profiles = {run.job.run_id: propose_profile(run.facts) or run.facts.machine for run in runs}
    groups: dict[tuple[str, str, str, str, int, int, str], list[Summary]] = {}
    for s in summaries:
        if s.sustained is None:
            key = (profiles[s.run_id], s.artifact_sha256 or s.artifact, s.runtime, s.provider, s.threads, s.batch, s.plan)
            groups.setdefault(key, []).append(s)
    device = devices_of(summaries)
    asked = [
        (key, group)
        for key, group in groups.items()
        if len({device[s.target] for s in group if not batch or s.batch_id == batch}) > 1
    ]
    return [_spread(key[0], group, device) for key, group in asked]


def devices_of(summaries: Sequence[Summary]) -> dict[str, str]:
    """Target → the device it is, named after the first target that was on it."""
    device: dict[str, str] = {}
    booted: dict[str, str] = {}
    for s in summaries:
        here = device.get(s.target) or booted.get(s.boot_id or "") or s.target
        other = booted.setdefault(s.boot_id, here) if s.boot_id else here
        device[s.target] = here
        if other != here:  # two names until this run showed that they are one
            device = {target: here if name == other else name for target, name in device.items()}
            booted = {boot: here if name == other else name for boot, name in booted.items()}
    return device


def _spread(profile: str, group: Sequence[Summary], device: Mapping[str, str]) -> DeviceSpread:
    measured: dict[str, list[Sequence[float]]] = {}
    for s in group:
        if s.rankable and s.process_p50_ms:
            measured.setdefault(device[s.target], []).append(s.process_p50_ms)
    first = group[0]
    return DeviceSpread(
        profile=profile,
        model=first.model,
        label=first.label,
        runtime=first.runtime,
        provider=first.provider,
        threads=first.threads,
        found=variance_components(measured) if len(measured) > 1 else None,
        not_valid=tuple(dict.fromkeys(s.target for s in group if device[s.target] not in measured)),
    )


def extremes(means: Mapping[str, float]) -> tuple[tuple[str, float], tuple[str, float]]:
    """(the fastest device and its mean, the slowest and its). ValueError where there is none."""
    ordered = sorted(means.items(), key=lambda one: (one[1], one[0]))
    if not ordered:
        raise ValueError("no device")
    return ordered[0], ordered[-1]
