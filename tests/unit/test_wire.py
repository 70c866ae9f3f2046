"""The codec: what goes in comes out, and nothing foreign gets in or raises anything but WireError."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_agents import wire

ROOTS = (wire.Manifest, wire.Facts, wire.Job, wire.Run, wire.Refusal, wire.Verdict)
SLOW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def values_of(cls: type) -> st.SearchStrategy[Any]:
    """Values of a wire class, made from nothing but its declaration."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: value_for(hints[f.name], f.metadata) for f in dataclasses.fields(cls)}
    return st.builds(lambda **kw: kw, **fields).map(lambda kw: build(cls, kw)).filter(lambda v: v is not None)


def build(cls: type, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except wire.WireError:
        return None  # a rule over several fields did not hold


def value_for(hint: Any, limits: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return st.none() | value_for(arguments[0], limits)
    if origin is tuple:
        low, high = limits.get("min_items", 0), limits.get("max_items", 1000)
        return st.lists(value_for(arguments[0], limits), min_size=low, max_size=min(high, low + 2)).map(tuple)
    if origin is dict:
        return st.dictionaries(texts({}), value_for(arguments[1], {}), max_size=2)
    if dataclasses.is_dataclass(hint):
        return values_of(typing.cast(type, hint))
    if hint is str:
        return texts(limits)
    if hint is bool:
        return st.booleans()
    low, high = limits.get("low", -(2**62)), limits.get("high", 2**62)
    if hint is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def texts(limits: Any) -> st.SearchStrategy[str]:
    if limits.get("choices"):
        return st.sampled_from(limits["choices"])
    if limits.get("pattern"):
        found = st.from_regex(limits["pattern"], fullmatch=True)
        return found.filter(lambda s: len(s) <= limits.get("max_len", 400))
    letters = st.characters(min_codepoint=32, exclude_categories=["Cs"])
    return st.text(letters, max_size=min(limits.get("max_len", 400), 12))


@pytest.mark.parametrize("cls", ROOTS, ids=lambda c: c.__name__)
def test_what_is_written_is_read_back(cls: type) -> None:
    @SLOW
    @given(values_of(cls))
    def check(value: Any) -> None:
        data = wire.dumps(value)
        assert wire.loads(cls, data, "x", 10**9) == value
        assert wire.dumps(wire.loads(cls, data, "x", 10**9)) == data

    check()


@pytest.mark.parametrize("cls", ROOTS, ids=lambda c: c.__name__)
def test_a_changed_document_raises_wire_error_or_is_read(cls: type) -> None:
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=4,
    )

    @SLOW
    @given(values_of(cls), junk, st.data())
    def check(value: Any, replacement: Any, data: st.DataObject) -> None:
        document = wire.encode(value)
        mutate(document, replacement, data)
        try:
            wire.loads(cls, json.dumps(document).encode("utf-8", "surrogatepass"), "x", 10**9)
        except wire.WireError:
            pass

    check()


def mutate(document: Any, replacement: Any, data: st.DataObject) -> None:
    """Replace, remove or add one thing somewhere inside."""
    here = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(here[key], (dict, list)) and len(here[key]) > 0
        if deeper and data.draw(st.booleans()):
            here = here[key]
            continue
        what = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            here[key] = replacement
        elif what == "remove":
            del here[key]
        elif isinstance(here, dict):
            here["surprise"] = replacement
        else:
            here.append(replacement)
        return


@SLOW
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_wire_error(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.loads(wire.Manifest, data, "manifest", 1000)


REFUSED = {
    "duplicate key": (b'{"code":"a","code":"b","message":"m"}', "twice"),
    "not a number": (b'{"code":"a","message":NaN}', "NaN"),
    "infinity": (b'{"code":"a","message":-Infinity}', "Infinity"),
    "too deep": (b"[" * 33 + b"]" * 33, "deeper"),
    "unknown key": (b'{"code":"a","message":"m","x":1}', "unknown key"),
    "missing key": (b'{"code":"a"}', "missing"),
    "path in a name": (b'{"code":"../a","message":"m"}', "expected the form"),
    "control character": (b'{"code":"a","message":"\\u0007"}', "control"),
    "lone surrogate": (b'{"code":"a","message":"\\ud800"}', "control"),
    "not utf-8": (b'{"code":"\xff"}', "not a JSON"),
    "too large": (b" " * 1001, "at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(wire.WireError, match=words):
        wire.loads(wire.Refusal, data, "refusal", 1000)


def test_depth_counts_brackets_outside_strings_only() -> None:
    wire.parse_json(json.dumps(["[" * 100 + '\\"' + "{" * 100]).encode(), "x", 1000)


def test_depth_is_counted_in_linear_time() -> None:
    """An unterminated string of escaped quotes must not be scanned again from each of them."""
    with pytest.raises(wire.WireError, match="not a JSON"):
        wire.parse_json(b'"' + b'\\"' * 2_000_000, "x", 10**7)


def test_the_place_of_a_fault_is_named() -> None:
    job = {"schema": wire.JOB_SCHEMA, "plan": {"name": 3}}
    with pytest.raises(wire.WireError) as caught:
        wire.decode(wire.RunPlan, {**job["plan"]}, "job.plan")  # type: ignore[dict-item]
    assert str(caught.value).startswith("job.plan.name: ")
