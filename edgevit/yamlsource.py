"""YAML files → values that know the file and line of every key, and problems reported all at once.

The only reader of YAML in the house. A file is read with YAML 1.2 rules (``no`` is a text, not a truth value) into plain
values; positions come from the parser's own nodes. What people trip over is refused with its line: a key that stands twice, a
tab as indentation, keys that are not texts, tags, merge keys, more than one document, an alias that unfolds without end.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgevit.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 32

Key = str | int
Place = tuple[Key, ...]

M = TypeVar("M", bound="BaseModel")


@dataclass(frozen=True)
class YamlDocument:
    """A file's values (dict, list, str, int, float, bool, None) and the line, from 1, of every key and list entry."""

    name: str
    text: str
    value: Any
    lines: Mapping[Place, int] = field(repr=False)

    def line(self, place: Place) -> int:
        """The line of ``place``, or of the nearest thing around it that is in the file."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def problem(self, place: Place, message: str) -> str:
        """``file:line: dotted.key: message``, for checks that go beyond a model's own."""
        dotted = dotted_key(place)
        return f"{self.name}:{self.line(place)}: {dotted}{': ' if dotted else ''}{message}"


def dotted_key(place: Place) -> str:
    """``("steps", 0, "bits")`` → ``steps[0].bits``."""
    out = ""
    for key in place:
        out += f"[{key}]" if isinstance(key, int) else (f".{key}" if out else key)
    return out


def load_yaml(path: Path | Traversable, *, max_bytes: int = MAX_BYTES, max_nodes: int = MAX_NODES) -> YamlDocument:
    """Read one file, or a resource of the package, of at most ``max_bytes`` that unfolds to at most ``max_nodes`` values.

    Raises :class:`ConfigError` naming file and line where it is absent, too large, not UTF-8 or not the YAML described above.
    """
    name = str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as e:
        raise ConfigError([f"{name}: cannot be read: {e.strerror or e}"]) from e
    if len(data) > max_bytes:
        raise ConfigError([f"{name}: more than {max_bytes:,} bytes; a configuration file has at most that"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise ConfigError([f"{name}:{line}: byte 0x{data[e.start]:02x} is not UTF-8; save the file as UTF-8"]) from e
    return parse_yaml(text, name, max_nodes=max_nodes)


def parse_yaml(text: str, name: str, *, max_nodes: int = MAX_NODES) -> YamlDocument:
    """Pure part of :func:`load_yaml`; ``name`` stands for the file in messages."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except YAMLError as e:
        raise ConfigError([_syntax_problem(e, text, name)]) from e
    except RecursionError as e:
        raise ConfigError([f"{name}: nested deeper than {MAX_DEPTH} levels"]) from e
    except (ValueError, IndexError, AttributeError, TypeError, OverflowError) as e:
        # The parser is fed by people; whatever odd input trips its own code is still a problem of the file.
        raise ConfigError([f"{name}: not YAML: {e}"]) from e
    if root is None:
        raise ConfigError([f"{name}:1: the file is empty"])
    reader = _Reader(name, yaml.constructor, max_nodes)
    value = reader.read(root, (), 0)
    if reader.problems:
        raise ConfigError(reader.problems)
    return YamlDocument(name, text, value, reader.lines)


def _syntax_problem(error: Exception, text: str, name: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = str(getattr(error, "problem", None) or "").strip()
    context = str(getattr(error, "context", None) or "").strip()
    if mark is None:
        position = getattr(error, "position", None)
        if isinstance(position, int) and position < len(text):
            line = text[:position].count("\n") + 1
            return f"{name}:{line}: the character U+{ord(text[position]):04X} cannot stand in a YAML file"
        return f"{name}: not YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    line = mark.line + 1
    if "'\\t'" in problem:
        return f"{name}:{line}: a tab stands where YAML wants spaces; indent with spaces"
    if "expected a single document" in context:
        return f"{name}:{line}: a second document starts here; expected one document in the file"
    if "undefined alias" in problem:
        return f"{name}:{line}: {problem.replace('found undefined alias', 'no anchor is defined for the alias')}"
    said = " ".join(f"{context}, {problem}".strip(", ").split())
    return f"{name}:{line}: not YAML: {said}"


_SCALARS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


# A block or a class may be named by its number; 010 or 1_000 mean different numbers to different readers.
_PLAIN_NUMBER = re.compile(r"0|[1-9][0-9]*")


def _is_text(node: Any) -> bool:
    return str(node.tag) == "tag:yaml.org,2002:str"


class _Reader:
    """Nodes → plain values, noting lines and problems on the way."""

    def __init__(self, name: str, constructor: Any, max_nodes: int) -> None:
        self.name = name
        self.max_nodes = max_nodes
        self.constructor = constructor
        self.lines: dict[Place, int] = {}
        self.problems: list[str] = []
        self.nodes = 0

    def complain(self, node: Any, place: Place, message: str) -> None:
        dotted = dotted_key(place)
        self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {dotted + ': ' if dotted else ''}{message}")

    def read(self, node: Any, place: Place, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise ConfigError([f"{self.name}: unfolds to more than {self.max_nodes:,} values; are aliases nested in aliases?"])
        if depth > MAX_DEPTH:
            raise ConfigError([f"{self.name}:{node.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels"])
        self.lines.setdefault(place, node.start_mark.line + 1)
        if node.id == "mapping":
            return self.read_mapping(node, place, depth)
        if node.id == "sequence":
            if not self.plain_tag(node, "seq"):
                self.complain(node, place, f"the tag {node.tag} is not understood; write a plain list")
                return None
            return [self.read(child, (*place, i), depth + 1) for i, child in enumerate(node.value)]
        return self.read_scalar(node, place)

    @staticmethod
    def plain_tag(node: Any, kind: str) -> bool:
        return node.tag is None or str(node.tag) == f"tag:yaml.org,2002:{kind}"

    def read_mapping(self, node: Any, place: Place, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if not self.plain_tag(node, "map"):
            self.complain(node, place, f"the tag {node.tag} is not understood; write a plain mapping")
            return out
        for key_node, value_node in node.value:
            if key_node.id != "scalar" or not (_is_text(key_node) or _PLAIN_NUMBER.fullmatch(key_node.value)):
                shown = f" ({key_node.value})" if key_node.id == "scalar" else ""
                hint = f"; write '{key_node.value}' in quotes" if key_node.id == "scalar" and key_node.value != "<<" else ""
                what = "merge keys (<<) are not supported" if shown == " (<<)" else f"a key{shown} that is not a text{hint}"
                self.complain(key_node, place, what)
                continue
            key = key_node.value
            here = (*place, key)
            if key in out:
                self.complain(key_node, here, f"this key stands twice; the first is on line {self.lines[here]}")
                continue
            if any(0xD800 <= ord(c) <= 0xDFFF for c in key):
                self.complain(key_node, place, "a key holds half a character (a lone surrogate)")
                continue
            self.lines[here] = key_node.start_mark.line + 1
            out[key] = self.read(value_node, here, depth + 1)
        return out

    def read_scalar(self, node: Any, place: Place) -> Any:
        tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
        text: str = node.value
        try:
            if tag in ("str", "timestamp"):
                if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                    raise ValueError("a text that holds half a character (a lone surrogate)")
                return text
            if tag == "null":
                return None
            if tag == "bool":
                return bool(self.constructor.construct_yaml_bool(node))
            if tag == "int":
                return int(self.constructor.construct_yaml_int(node))
            if tag == "float":
                number = float(self.constructor.construct_yaml_float(node))
                if not math.isfinite(number):
                    raise ValueError(f"{text} is not a finite number")
                return number
        except (ValueError, KeyError, IndexError, OverflowError) as e:
            detail = str(e) if "finite" in str(e) or "surrogate" in str(e) else f"not {_SCALARS[tag]}"
            self.complain(node, place, f"{text[:60]!r}: {detail}")
            return None
        self.complain(node, place, f"the tag {node.tag} is not understood")
        return None


# --------------------------------------------------------------------------------------------------------------------
# Values → a model, or every problem in plain words
# --------------------------------------------------------------------------------------------------------------------


def validate(document: YamlDocument, model: type[M]) -> M:
    """The document as a ``model``, or :class:`ConfigError` with all problems at once, each ``file:line: key.path: message``.

    Types are held strictly: ``"4"`` is not a number and ``1`` is not true. ``model`` forbids unknown keys itself
    (``extra="forbid"``); the nearest known key is offered.
    """
    from pydantic import ValidationError

    try:
        # Through JSON: there, strict still takes a list for a tuple and a text for an enum or a path.
        return model.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as e:
        errors = [dict(one) for one in e.errors(include_url=False)]
    raise ConfigError(list(_in_words(document, model, errors)))


def _in_words(document: YamlDocument, model: type[BaseModel], errors: list[dict[str, Any]]) -> Iterator[str]:
    """One problem per place; what several branches of a union expected there is joined by "or"."""
    free: dict[tuple[Place, str], None] = {}
    expected: dict[Place, list[str]] = {}
    values: dict[Place, Any] = {}
    suggestions: dict[Place, str] = {}
    for error in errors:
        place = _place_of(document, error)
        values[place] = _value_at(document.value, place)
        if error["type"] == "too_short" and len(values[place] or ()) >= error["ctx"]["min_length"]:
            continue  # pydantic counts only the entries that were valid, and those that were not are reported themselves
        words = _expectation(error)
        if words is not None:
            expected.setdefault(place, [])
            if words not in expected[place]:
                expected[place].append(words)
            suggestions.setdefault(place, _near_value(error, values[place]))
        elif error["type"] == "extra_forbidden":
            free[place, _unknown_key(model, document, place)] = None
        elif error["type"] == "missing":
            free[place, "this key is missing"] = None
        else:
            free[place, _own_message(error)] = None
    found = [(place, message) for place, message in free]
    for place, wants in expected.items():
        found.append((place, f"got {_shown(values[place])}, expected {' or '.join(wants)}{suggestions[place]}"))
    # By line, so that the list reads like the file; a missing key comes where its parent stands.
    for place, message in sorted(found, key=lambda f: (document.line(f[0]), dotted_key(f[0]), f[1])):
        yield document.problem(place, message)


def _place_of(document: YamlDocument, error: dict[str, Any]) -> Place:
    """Pydantic's location without what it adds for unions and validators, which is not in the file."""
    place: list[Key] = []
    value = document.value
    loc = error["loc"]
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if _holds(value, part):
            place.append(part)
            value = value[part]
        elif last and error["type"] == "missing":
            place.append(part)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        place.append(str(error["ctx"]["discriminator"]).strip("'"))
    return tuple(place)


def _holds(value: Any, key: Key) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)


def _value_at(value: Any, place: Place) -> Any:
    for key in place:
        if not _holds(value, key):
            return None
        value = value[key]
    return value


_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of sensible size",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping (key: value lines)",
    "model_type": "a mapping (key: value lines)",
    "model_attributes_type": "a mapping (key: value lines)",
    "dataclass_type": "a mapping (key: value lines)",
    "mapping_type": "a mapping (key: value lines)",
    "none_required": "nothing",
    "path_type": "a path",
}

_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def _expectation(error: dict[str, Any]) -> str | None:
    """What was expected, where the problem is "got this, expected that"; None for the other kinds."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"{words} {ctx[key]}"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        choices = _choices(error)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else f"{choices[0]!r}"
    if kind == "string_pattern_mismatch":
        return f"a text of the form {ctx['pattern']}"
    if kind == "string_too_short":
        return f"at least {ctx['min_length']} character{'s' if ctx['min_length'] != 1 else ''}"
    if kind == "string_too_long":
        return f"at most {ctx['max_length']} characters"
    return None


def _choices(error: dict[str, Any]) -> list[str]:
    ctx = error.get("ctx", {})
    listed = str(ctx.get("expected") or ctx.get("expected_tags") or "")
    quoted = re.findall(r"'((?:[^'\\]|\\.)*)'", listed)
    return quoted or [part.strip() for part in re.split(r",| or ", listed) if part.strip()]


def _near_value(error: dict[str, Any], value: Any) -> str:
    if error["type"] not in ("literal_error", "enum", "union_tag_invalid") or not isinstance(value, str):
        return ""
    return _did_you_mean(value, _choices(error))


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    if not near:
        folded = {k.casefold().replace("_", "-"): k for k in known}
        hit = folded.get(word.casefold().replace("_", "-"))
        near = [hit] if hit else []
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _own_message(error: dict[str, Any]) -> str:
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(ctx.get("error") or error["msg"].split(", ", 1)[-1])
    if kind == "union_tag_not_found":
        return "this key is missing"
    if kind in ("too_short", "too_long"):
        bound = f"at least {ctx['min_length']}" if kind == "too_short" else f"at most {ctx['max_length']}"
        return f"got {ctx.get('actual_length', 'more')} entries, expected {bound}"
    message = str(error["msg"]).removeprefix("Input should be ")
    return f"got {_shown(error.get('input'))}, expected {message}" if message != error["msg"] else message


def _shown(value: Any) -> str:
    """A value as a person wrote it, with its kind, short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        cut = value if len(value) <= 60 else value[:57] + "…"
        return f"the text {cut!r}"
    if isinstance(value, int | float):
        shown = str(value)
        return shown if len(shown) <= 40 else f"a number of {len(shown)} digits"
    return "a list" if isinstance(value, list) else "a mapping"


def _unknown_key(model: type[BaseModel], document: YamlDocument, place: Place) -> str:
    known = sorted(known_keys(model, document.value, place[:-1]))
    near = _did_you_mean(str(place[-1]), known) if place else ""
    if near:
        return f"unknown key{near}"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def known_keys(model: type[BaseModel], value: Any, place: Place) -> set[str]:
    """The keys ``model`` accepts at ``place`` of a document holding ``value`` (a union's branch is told by its tag)."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    branches = _branches(schema, definitions, value)
    for key in place:
        value = _value_at(value, (key,))
        below: list[dict[str, Any]] = []
        for branch in branches:
            if isinstance(key, int):
                one = branch.get("items")
            else:
                one = branch.get("properties", {}).get(key) or branch.get("additionalProperties")
            if isinstance(one, dict):
                below += _branches(one, definitions, value)
        branches = below
    return {name for branch in branches for name in branch.get("properties", {})}


def _branches(schema: dict[str, Any], definitions: dict[str, Any], value: Any) -> list[dict[str, Any]]:
    """``schema`` with references followed and unions opened."""
    if "$ref" in schema:
        return _branches(definitions.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), definitions, value)
    tagged = schema.get("discriminator")
    if tagged and isinstance(value, dict):
        reference = tagged.get("mapping", {}).get(value.get(tagged.get("propertyName")))
        if reference:
            return _branches({"$ref": reference}, definitions, value)
    out: list[dict[str, Any]] = []
    for word in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(word, []):
            out += _branches(one, definitions, value)
    return out or [schema]
