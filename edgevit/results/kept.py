"""Summaries kept beside their runs, so that a table of ten thousand runs need not count a million samples anew.

What is kept is what :func:`edgevit.results.stats.summarize` says of one run. It counts only while the code that says it is the
same: every kept summary carries a digest of that code, the verdict's rules among it, and is made anew where it differs.
Predictions are not kept twice: they stand with their measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from device_agents import verdict, wire
from edgevit.results import energy, intervals, percentiles, stats, summary, sustained
from edgevit.results.summary import Summary, with_values

MAKERS = (stats, summary, percentiles, energy, intervals, sustained, verdict, wire)
"""Everything that a summary is made by."""

Predictions = tuple[tuple[int, ...], tuple[int, ...]]
"""What was said of each image, and its label."""

_FIELDS = tuple(f.name for f in dataclasses.fields(Summary))
_LEFT_OUT = frozenset({"predictions", "labels", "profile"})
"""Of a measurement's own rows, and operators, which can be thousands."""


@functools.cache
def code_digest() -> str:
    """Of the code of :data:`MAKERS`."""
    sources = "".join(inspect.getsource(module) for module in MAKERS)
    return hashlib.sha256(sources.encode("utf-8")).hexdigest()[:16]


def pack_summaries(summaries: Sequence[Summary]) -> str:
    """The summaries of one run as JSON: a list of values each, in the order of the fields."""
    return json.dumps([[_plain(s, name) for name in _FIELDS] for s in summaries], ensure_ascii=False, allow_nan=False)


def unpack_summaries(document: str, scored: Mapping[int, Predictions]) -> list[Summary]:
    """What :func:`pack_summaries` packed, with the predictions and labels that ``scored`` holds by position, without operators.
    ValueError where it is damaged."""
    try:
        return [_summary(values, scored.get(position)) for position, values in enumerate(json.loads(document))]
    except (TypeError, LookupError) as e:
        raise ValueError(f"no kept summary: {e}") from e


def _plain(s: Summary, name: str) -> Any:
    value = None if name in _LEFT_OUT else getattr(s, name)
    if name == "cooling":
        return [dataclasses.astuple(one) for one in s.cooling]
    return dataclasses.astuple(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _summary(values: list[Any], scored: Predictions | None) -> Summary:
    told: dict[str, Any] = dict(zip(_FIELDS, (tuple(v) if type(v) is list else v for v in values), strict=True))
    rules, valid, reasons, warnings = told["verdict"]
    told["verdict"] = wire.Verdict(rules, valid, tuple(reasons), tuple(warnings))
    told["cooling"] = tuple(wire.Cooling(*one) for one in told["cooling"])
    if scored is not None:
        told["predictions"], told["labels"] = scored
    if told["sustained"] is not None:
        told["sustained"] = _sustained(told["sustained"])
    return with_values(None, told)


def _sustained(values: tuple[Any, ...]) -> sustained.Sustained:
    told: dict[str, Any] = dict(zip((f.name for f in dataclasses.fields(sustained.Sustained)), values, strict=True))
    knee, span = told["knee"], told["temperature_c"]
    told["knee"] = None if knee is None else sustained.Knee(*knee)
    told["temperature_c"] = None if span is None else tuple(span)
    return sustained.Sustained(**told)
