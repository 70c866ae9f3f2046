"""Frozen records ↔ JSON, strictly: fields that know their limits, and the decoder that holds them.

An unknown key, a missing key, a wrong type, a value outside its declared limits, a duplicate key, NaN or Infinity, or nesting
deeper than :data:`MAX_DEPTH` is a :class:`WireError` that names the place (``manifest.artifacts[1].format``), what stood there
and what was expected. Runs on Python 3.8 with the standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import field
from typing import TYPE_CHECKING, Any, Dict, Tuple, Type, TypeVar, Union

from device_agents.limits import NAME_PATTERN, SHA256_PATTERN

MAX_DEPTH = 32

T = TypeVar("T")


class WireError(ValueError):
    """A document does not have the declared shape; ``path`` names the place inside it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__("{}: {}".format(path, message))
        self.path = path


def text(pattern: str = "", max_len: int = 400, choices: Tuple[str, ...] = (), default: Any = dataclasses.MISSING) -> Any:
    """A string field with limits that the decoder holds."""
    return field(default=default, metadata={"pattern": pattern, "max_len": max_len, "choices": choices})


def number(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """An int or float field; ``low`` and ``high`` are inclusive."""
    return field(default=default, metadata={"low": low, "high": high})


def items(max_items: int, min_items: int = 0, pattern: str = "", max_len: int = 400, default: Any = dataclasses.MISSING) -> Any:
    """A tuple or mapping field with a limit on its length; the limits on text hold for each element."""
    return field(
        default=default,
        metadata={"max_items": max_items, "min_items": min_items, "pattern": pattern, "max_len": max_len},
    )


def sha256_field() -> Any:
    return text(SHA256_PATTERN, 64)


def name_field(max_len: int = 120) -> Any:
    return text(NAME_PATTERN, max_len)


if TYPE_CHECKING:  # device_agents runs without typing_extensions; mypy brings its own
    from typing_extensions import dataclass_transform

    @dataclass_transform(frozen_default=True, field_specifiers=(text, number, items, sha256_field, name_field))
    def record(cls: Type[T]) -> Type[T]: ...

else:

    def record(cls):
        """``dataclass(frozen=True)`` whose comparing, hashing and showing are shared instead of compiled for each class.

        The classes of the wire are made at every start of the agent; compiling all their methods took half of it.
        """
        cls.__repr__, cls.__eq__, cls.__hash__ = _show, _equal, _hash
        return dataclasses.dataclass(frozen=True, repr=False, eq=False)(cls)


def _values(record_: Any) -> Tuple[Any, ...]:
    return tuple(getattr(record_, name) for name in record_.__dataclass_fields__)


def _show(self: Any) -> str:
    inner = ", ".join("{}={!r}".format(name, getattr(self, name)) for name in self.__dataclass_fields__)
    return "{}({})".format(type(self).__qualname__, inner)


def _equal(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def encode(value: Any) -> Any:
    """A wire value → plain JSON values. Dataclass fields keep their declared order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WireError("value", "{!r} cannot cross the wire; use None with a reason".format(value))
        return value
    raise WireError("value", "{} is not a wire type".format(type(value).__name__))


def dumps(value: Any) -> bytes:
    """A wire value → canonical bytes: sorted keys, no spaces, UTF-8, one trailing newline."""
    return (
        json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    ).encode("utf-8")


def parse_json(data: bytes, what: str, max_bytes: int) -> Any:
    """Untrusted bytes → JSON values, or :class:`WireError`. Size and depth are checked before anything is built."""
    if len(data) > max_bytes:
        raise WireError(what, "{:,} bytes, at most {:,} are accepted".format(len(data), max_bytes))
    _check_depth(data, what)

    def no_duplicates(pairs: Any) -> Dict[str, Any]:
        out: Dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise WireError(what, "the key {!r} appears twice".format(key[:80]))
            out[key] = value
        return out

    def no_constant(name: str) -> Any:
        raise WireError(what, "{} is not a number JSON allows".format(name))

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except WireError:
        raise
    except (ValueError, RecursionError) as e:
        raise WireError(what, "not a JSON document: {}".format(e)) from e


_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""Whole strings, so that brackets inside them are passed over, and brackets. An unterminated string takes all the rest."""


def _check_depth(data: bytes, what: str) -> None:
    depth = 0
    for token in _TOKENS.finditer(data):
        first = data[token.start()]
        if first in (0x7B, 0x5B):
            depth += 1
            if depth > MAX_DEPTH:
                raise WireError(what, "nested deeper than {} levels".format(MAX_DEPTH))
        elif first in (0x7D, 0x5D):
            depth -= 1


def loads(cls: Type[T], data: bytes, what: str, max_bytes: int) -> T:
    """Untrusted bytes → a value of ``cls``, or :class:`WireError`."""
    return decode(cls, parse_json(data, what, max_bytes), what)


def decode(cls: Type[T], value: Any, path: str) -> T:
    """JSON values → a value of the dataclass ``cls``, strictly."""
    result = _decode_dataclass(cls, value, path)
    return typing.cast(T, result)


_HINTS: Dict[type, Dict[str, Any]] = {}


def _decode_dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise WireError(path, "got {}, expected an object".format(_kind(value)))
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    hints = _HINTS[cls]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise WireError("{}.{}".format(path, unknown[0][:80]), "unknown key")
    out = {}
    for name, f in fields.items():
        here = "{}.{}".format(path, name)
        if name in value:
            out[name] = _decode_value(hints[name], value[name], here, f.metadata)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise WireError(here, "missing")
    try:
        return cls(**out)
    except WireError as e:
        raise WireError("{}.{}".format(path, e.path) if e.path else path, str(e).split(": ", 1)[-1]) from e


def _decode_value(hint: Any, value: Any, path: str, limits: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Union:
        if value is None and type(None) in typing.get_args(hint):
            return None
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return _decode_value(inner[0], value, path, limits)
    if origin is tuple:
        if not isinstance(value, list):
            raise WireError(path, "got {}, expected a list".format(_kind(value)))
        _check_count(len(value), path, limits)
        element = typing.get_args(hint)[0]
        return tuple(_decode_value(element, v, "{}[{}]".format(path, i), limits) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise WireError(path, "got {}, expected an object".format(_kind(value)))
        _check_count(len(value), path, limits)
        element = typing.get_args(hint)[1]
        for key in value:
            if len(key) > 400:
                raise WireError(path, "a key of {} characters, at most 400".format(len(key)))
        return {k: _decode_value(element, v, "{}[{!r}]".format(path, k), {}) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast(type, hint), value, path)
    if hint is str:
        return _check_text(value, path, limits)
    if hint is bool:
        if not isinstance(value, bool):
            raise WireError(path, "got {}, expected true or false".format(_kind(value)))
        return value
    if hint is int or hint is float:
        return _check_number(hint, value, path, limits)
    raise WireError(path, "undeclared type {!r}".format(hint))


def _check_count(count: int, path: str, limits: Any) -> None:
    high, low = limits.get("max_items", 1000), limits.get("min_items", 0)
    if not low <= count <= high:
        raise WireError(path, "{} entries, expected {} to {}".format(count, low, high))


def _check_text(value: Any, path: str, limits: Any) -> str:
    if not isinstance(value, str):
        raise WireError(path, "got {}, expected a text".format(_kind(value)))
    high = limits.get("max_len", 400)
    if len(value) > high:
        raise WireError(path, "{} characters, at most {}".format(len(value), high))
    if limits.get("choices") and value not in limits["choices"]:
        raise WireError(path, "got {!r}, expected one of {}".format(value[:80], ", ".join(limits["choices"])))
    if limits.get("pattern") and re.fullmatch(limits["pattern"], value) is None:
        raise WireError(path, "got {!r}, expected the form {}".format(value[:80], limits["pattern"]))
    if any(ord(c) < 32 and c not in "\n\t" for c in value) or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise WireError(path, "holds a control character")
    return value


def _check_number(hint: Any, value: Any, path: str, limits: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WireError(path, "got {}, expected a number".format(_kind(value)))
    if hint is int and not isinstance(value, int):
        raise WireError(path, "got {!r}, expected a whole number".format(value))
    low, high = limits.get("low", -(2**63)), limits.get("high", 2**63 - 1)
    if not low <= value <= high:
        raise WireError(path, "got {}, expected {} to {}".format(str(value)[:40], low, high))
    return float(value) if hint is float else value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
