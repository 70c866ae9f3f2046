"""Draws where a limit is just held, from those that are known. Pure.

What a step costs in accuracy grows with its strength, and so does what it saves; so the fastest draw of a family lies on the
boundary of what the limits allow. Draws that differ in one strength alone lie on a line; on it the boundary is looked for as
the root of a function that rises: by false position between two neighbours on either side of it, by the secant beyond the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgevit.tune.space import STRENGTHS, SWITCHES, Draw, Value

LEAST_GAIN = 0.01
"""Of the logarithm of time: a build is worth about a hundredth."""

NEAREST = 0.25
"""No nearer to a neighbour, as a share of the way to the other: what is counted on images is no smooth function."""

FARTHEST = 2.0
"""No farther beyond the last than it lies from its neighbour."""


@dataclass(frozen=True)
class Outcome:
    """Of ``value`` the less the better; ``beyond``: how far beyond the limit held least, 0 or less where all are held."""

    value: float
    beyond: float


Known = tuple[Draw, Outcome | None]
"""A draw with what came of it; None where that is not known yet, or it could not be built."""


def draw_at_boundary(known: Iterable[Known]) -> Draw | None:
    """The draw near the boundary that promises the least value; None where none promises to be better than what is known to
    hold every limit, or nothing is known to."""
    known = list(known)
    held = [o.value for _, o in known if o is not None and o.beyond <= 0]
    if not held:
        return None
    found = [(promised, i, draw) for i, (promised, draw) in enumerate(_near(known))]
    promised, _, draw = min(found, default=(0.0, 0, None), key=lambda one: one[:2])
    return draw if promised <= min(held) - LEAST_GAIN else None


def _near(known: Iterable[Known]) -> Iterator[tuple[float, Draw]]:
    """(value promised, draw) of each line, wherever the boundary lies between two neighbours or beyond the last."""
    for (name, _), line in _lines(known).items():
        for a, b, least, most in _pairs(sorted(line)):
            (one, start), (other, end) = line[a], line[b]
            if start is None or end is None or start.beyond > 0 or (most < 1) != (end.beyond > 0):
                continue
            rise = end.beyond - start.beyond
            share = min(max(-start.beyond / rise, least), most) if rise > 0 else most
            low, high = STRENGTHS[name]
            strength = round(min(max(a + share * (b - a), low), high), 2)
            if strength not in line:
                yield start.value + share * (end.value - start.value), {**(one if name in one else other), name: strength}


def _pairs(places: Sequence[float]) -> Iterator[tuple[float, float, float, float]]:
    """(from, to, least, most): between neighbours, from either, so much of the way; beyond the ends, a way of 1 or more."""
    for a, b in pairwise(places):
        yield a, b, NEAREST, 1 - NEAREST
        yield b, a, NEAREST, 1 - NEAREST
    if len(places) > 1:
        yield places[-2], places[-1], 1.0, FARTHEST
        yield places[1], places[0], 1.0, FARTHEST


def _lines(known: Iterable[Known]) -> Mapping[tuple[str, frozenset[tuple[str, Value]]], Mapping[float, Known]]:
    """Draws that differ in one strength alone, by that strength. A step that is left out has the strength 0."""
    lines: dict[tuple[str, frozenset[tuple[str, Value]]], dict[float, Known]] = defaultdict(dict)
    for draw, outcome in known:
        taken = {k: v for k, v in draw.items() if v is not False and v != "none" and (k, v) != ("recovery", 0)}
        for name in STRENGTHS:
            switch = SWITCHES.get(name, "")
            if name not in taken and (not switch or switch in taken):
                continue
            rest = frozenset((k, v) for k, v in taken.items() if k not in (name, switch))
            line, strength = lines[name, rest], float(taken.get(name, 0.0))
            if outcome is not None or strength not in line:
                line[strength] = draw, outcome
    return lines
