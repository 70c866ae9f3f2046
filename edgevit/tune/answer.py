"""What a search found: one winner a target with its evidence, or the nearest and what it misses. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edgevit.tune.candidate import Candidate
from edgevit.tune.figures import Figures
from edgevit.tune.latency import LatencyTable
from edgevit.tune.limits import Miss, Reached, misses, not_known
from edgevit.tune.search import Search
from edgevit.tune.space import recipe_yaml


@dataclass(frozen=True)
class Rated:
    """A candidate on a target: ``confirmed`` where it was measured at length; ``misses`` says what it does not hold, or why no
    figure of it counts."""

    candidate: Candidate
    figures: Figures | None
    confirmed: bool
    misses: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What is to be said of one target. ``front`` is fastest first, the baseline behind it where it is not on the front;
    ``counts``: how many candidates ended in which way there; ``dead``: why the target did not see the search to its end;
    ``unbuilt``: where there is no winner, what would have the least weights of those too large to be built, if less than the
    nearest's."""

    target: str
    winner: Rated | None
    nearest: Rated | None
    front: tuple[Rated, ...]
    baseline: Rated
    table: LatencyTable
    counts: dict[str, int]
    dead: str
    unbuilt: Candidate | None = None


def answer(search: Search, target: str) -> Answer:
    """The answer on one target."""
    front = [rate(search, target, c) for c in search.front(target)]
    found = search.winner(target)
    winner = None if found is None else rate(search, target, found[0])
    nearest = None if winner is not None else _nearest(search, target)
    unbuilt = None if nearest is None else _smallest_unbuilt(search, nearest.candidate.size_mb)
    base = rate(search, target, search.baseline)
    counts: dict[str, int] = {}
    for c in search.candidates.values():
        word = _ended(c, search.figures(target).get(c.key), target)
        counts[word] = counts.get(word, 0) + 1
    dead = search.dead.get(target, "")
    return Answer(target, winner, nearest, tuple(front), base, search.table(target), counts, dead, unbuilt)


def rate(search: Search, target: str, c: Candidate) -> Rated:
    """One candidate on one target, by its confirmed figures where there are some."""
    confirmed = search.figures(target, search.confirm_plan).get(c.key)
    sure = confirmed is not None and confirmed.p50_ms is not None
    figures = confirmed if sure else search.figures(target).get(c.key)
    return Rated(c, figures, sure, _misses(search, c, figures, target))


def _misses(search: Search, c: Candidate, figures: Figures | None, target: str) -> tuple[str, ...]:
    if not c.built:
        return (f"{c.state}: {c.reason}",)
    reached = c.reached if figures is None else figures.reached(c)
    found = [m.text for m in _missed(search, c, reached, target)]
    if figures is None:
        return (*found, c.hopeless.get(target, "") or "it was not measured there") if not found else tuple(found)
    if figures.failure or figures.doubt:
        found.append(figures.failure or figures.doubt)
    else:
        unknown = not_known(reached, search.limits)
        found += [
            f"{name} was not measured" + (f": {figures.energy_absent}" if name == "energy_mj" else "") for name in unknown
        ]
    return tuple(found)


def _missed(search: Search, c: Candidate, reached: Reached, target: str) -> tuple[Miss, ...]:
    """The limits it does not hold; where its p90 was not measured there, it is above the p50 that is predicted."""
    found, most = misses(reached, search.limits), search.limits.p90_ms
    if most is None or reached.p90_ms is not None:
        return found
    predicted = search.table(target).predict(c.kind, c.macs)
    if predicted is None or predicted <= most:
        return found
    return (*found, Miss("p90_ms", f"p90 predicted above {predicted:.2f} ms, at most {most:g}", predicted / most - 1.0))


def _nearest(search: Search, target: str) -> Rated | None:
    """The candidate that misses the limits by the least in sum; of equals the measured, then the fastest. What was given up
    on there comes last."""
    ranked = []
    for c in search.candidates.values():
        if not c.built:
            continue
        one = rate(search, target, c)
        reached = c.reached if one.figures is None else one.figures.reached(c)
        missed = _missed(search, c, reached, target)
        ms = one.figures.p50_ms if one.figures is not None else None
        ranked.append(((target in c.hopeless, sum(m.share for m in missed), ms is None, ms or 0.0, c.number), one))
    if not ranked:
        return None
    nearest = min(ranked, key=lambda pair: pair[0])[1]
    return nearest if nearest.misses else dataclasses.replace(nearest, misses=(_unconfirmed(search, target, nearest),))


def _smallest_unbuilt(search: Search, below_mb: float) -> Candidate | None:
    large = [c for c in search.candidates.values() if not c.built and 0 < c.size_mb < below_mb]
    return min(large, key=lambda c: (c.size_mb, c.number), default=None)


def _unconfirmed(search: Search, target: str, rated: Rated) -> str:
    """Why a candidate that held every limit in the search is no winner."""
    found = search.figures(target, search.confirm_plan).get(rated.candidate.key)
    why = "" if found is None else found.failure or found.doubt
    return f"measured at length it gave no figure: {why}" if why else "it was not measured at length"


def _ended(c: Candidate, figures: Figures | None, target: str) -> str:
    if c.state != "passed":
        return c.state
    if figures is None:
        return "hopeless" if target in c.hopeless else "not measured"
    if figures.failure:
        return "failed there"
    return "measured" if figures.p50_ms is not None else "INVALID"


def to_json(search: Search, answers: list[Answer]) -> dict[str, Any]:
    """Everything a program may want to know."""
    return {
        "limits": dataclasses.asdict(search.limits),
        "ended": search.ended,
        "spent_seconds": round(search.spent, 1),
        "candidates": [_candidate_json(c) for _, c in sorted(search.candidates.items())],
        "targets": [
            {
                "target": a.target,
                "dead": a.dead,
                "winner": None if a.winner is None else _rated_json(a.winner),
                "nearest": None if a.nearest is None else _rated_json(a.nearest),
                "unbuilt": None if a.unbuilt is None else _candidate_json(a.unbuilt),
                "baseline": _rated_json(a.baseline),
                "front": [_rated_json(s) for s in a.front],
                "counts": a.counts,
                "latency_table": _table_json(a.table),
            }
            for a in answers
        ],
    }


def _candidate_json(c: Candidate) -> dict[str, Any]:
    values = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "recipe"}
    return {**values, "hopeless": dict(c.hopeless), "recipe": c.recipe.name, "recipe_digest": c.recipe.digest}


def _rated_json(s: Rated) -> dict[str, Any]:
    figures = None if s.figures is None else dataclasses.asdict(s.figures)
    text = recipe_yaml(s.candidate.recipe)
    return {
        "candidate": _candidate_json(s.candidate),
        "confirmed": s.confirmed,
        "figures": figures,
        "misses": list(s.misses),
        "recipe_yaml": text,
    }


def _table_json(table: LatencyTable) -> dict[str, Any]:
    lines = [
        {"format": k[0], "scheme": k[1], "threads": k[2], "merges": k[3], "base_ms": v.base, "ms_per_gmac": v.slope * 1e9}
        | {"measured": v.count}
        for k, v in sorted(table.lines.items())
    ]
    return {"median_error": table.error, "held_out": table.held_out, "lines": lines}
