"""What a person asks of a model on a board, and what a candidate misses of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from device_agents.wire import Facts
from edgevit.errors import UsageError

LEAST_LOSS_STEP = 0.5
"""Points of top-1 that count as one whole miss where no loss at all is allowed: a share of zero tells nothing."""


@dataclass(frozen=True)
class Limits:
    """The most that is allowed: points of top-1 lost to fp32 on the same images, p90 in ms, peak memory of the process and size
    of the file in MB (10⁶ bytes), energy of an inference in mJ. None: no limit."""

    loss: float
    p90_ms: float | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    energy_mj: float | None = None


@dataclass(frozen=True)
class Reached:
    """What a candidate comes to, in the units of :class:`Limits`; None where it is not known (yet)."""

    loss: float | None = None
    p90_ms: float | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    energy_mj: float | None = None


@dataclass(frozen=True)
class Miss:
    """A limit that is not held; ``share``: by how much of it."""

    limit: str
    text: str
    share: float


NAMES = {
    "loss": ("loss", "points"),
    "p90_ms": ("p90", "ms"),
    "memory_mb": ("memory", "MB"),
    "size_mb": ("size", "MB"),
    "energy_mj": ("energy", "mJ"),
}


def misses(reached: Reached, limits: Limits) -> tuple[Miss, ...]:
    """The limits that ``reached`` does not hold; what is not known misses nothing."""
    found = []
    for name, (word, unit) in NAMES.items():
        got, most = getattr(reached, name), getattr(limits, name)
        if got is None or most is None or got <= most + 1e-9:
            continue
        share = (got - most) / (max(most, LEAST_LOSS_STEP) if name == "loss" else most)
        found.append(Miss(name, f"{word} {got:.2f} {unit}, at most {most:g}", share))
    return tuple(found)


def not_known(reached: Reached, limits: Limits) -> tuple[str, ...]:
    """The limits that were asked for and of which nothing is known."""
    return tuple(n for n in NAMES if getattr(limits, n) is not None and getattr(reached, n) is None)


def shares(reached: Reached, limits: Limits) -> dict[str, float]:
    """Of each limit, how far ``reached`` is beyond it as a share, negative where it holds; what is not known is left out."""
    found = {}
    for name in NAMES:
        got, most = getattr(reached, name), getattr(limits, name)
        if got is not None and most is not None:
            found[name] = (got - most) / (max(most, LEAST_LOSS_STEP) if name == "loss" else most)
    return found


def verify_limits(limits: Limits) -> None:
    """Raises :class:`UsageError` for limits that nothing can hold."""
    for one in fields(limits):
        value = getattr(limits, one.name)
        word, unit = NAMES[one.name]
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and one.name != "loss"):
            least = "0 or more" if one.name == "loss" else "more than 0"
            raise UsageError(f"the limit of {word} is {value:g} {unit}, expected {least}", hint="edgevit tune --help")


def verify_measurable(limits: Limits, boards: Mapping[str, Facts]) -> None:
    """Raises :class:`UsageError` for limits that the targets' sensors or memory leave no way to hold; ``boards`` by target."""
    for name, facts in boards.items():
        if limits.energy_mj is not None and not any(s.startswith("power:") for s in facts.sensors):
            why = facts.absent.get("power", "it has no sensor of power")
            raise UsageError(
                f"{name}: energy cannot be held to {limits.energy_mj:g} mJ, for nothing there measures it: {why}",
                hint="leave --max-energy-mj out, or the target",
            )
