"""The fleet file: which boxes there are, and which of them a person means.

::

    schema: edgevit.fleet/1
    targets:
      kitchen:                      # or a list of entries with `name:`
        host: 192.168.1.20
        user: pi
        profile: raspberry-pi-4b
        tags: [lab]
      pi-[01-40]:                   # forty targets, pi-01 to pi-40
        host: pi-[01-40].local
        group: attic                # takes what it does not say itself from there, and the tag `attic`
      pi-07:                        # one of them is another board
        profile: raspberry-pi-5
    groups:
      attic:
        user: pi
        profile: raspberry-pi-4b
"""

from __future__ import annotations

import fnmatch
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgevit import places
from edgevit.durable import only_writer, write_private
from edgevit.errors import ConfigError, UnknownName, UsageError
from edgevit.yamlsource import YamlDocument, load_yaml, validate

SCHEMA = "edgevit.fleet/1"
LOCAL = "local"
NAME_FORM = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
HOST_FORM = r"^[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,254}$"
USER_FORM = r"^[A-Za-z0-9_.][A-Za-z0-9_.@$\\+-]{0,99}$"
RANGED_NAME_FORM = r"^[A-Za-z0-9\[][A-Za-z0-9._\[\]-]{0,80}$"
RANGED_HOST_FORM = r"^[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]{0,270}$"
MAX_RANGE = 4096
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_FILE_VALUES = 200_000
"""A fleet file may have tens of thousands of lines; other configuration is written by hand and far smaller."""

HOPS_FORM = r"^[^\s,-][^\s,]*(,[^\s,-][^\s,]*)*$"
# One program, no arguments and no control characters; `~` in a root is the login's home on the device.
PROGRAM_FORM = r"^[^\s\x00-\x1f-][^\x00-\x1f]{0,399}$"
PIN_FORM = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}@[1-9][0-9]{0,18}$"
ROOT_FORM = r"^[~/][^\x00-\x1f]{0,399}$"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(pattern=HOST_FORM)
    port: int | None = Field(default=None, ge=1, le=65535)
    user: str | None = Field(default=None, pattern=USER_FORM)
    key: str | None = Field(default=None, min_length=1, max_length=400)
    profile: str | None = None
    tags: tuple[Annotated[str, Field(pattern=NAME_FORM)], ...] = ()
    python: str = Field(default="python3", pattern=PROGRAM_FORM)
    root: str = Field(default="~/.edgevit", pattern=ROOT_FORM)
    jump: str | None = Field(default=None, pattern=HOPS_FORM, max_length=400)
    pin: str | None = Field(default=None, pattern=PIN_FORM)


def pin_of(bundle_name: str, version: int) -> str:
    """What ``pin:`` says of a target that stays with this bundle."""
    return f"{bundle_name}@{version}"


class Target(_Entry):
    """One real box. ``python`` and ``root`` are what they are called there; ``jump``
    lists hops as ``ssh -J`` takes them; ``pin`` names the bundle that it stays with, as ``vit-int8@7``."""

    name: str = Field(pattern=NAME_FORM)

    @property
    def is_local(self) -> bool:
        """The agent in a process on this machine, without SSH."""
        return self.name == LOCAL


class _Shared(BaseModel):
    """What the targets of a group have in common, where they do not say otherwise themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int | None = Field(default=None, ge=1, le=65535)
    user: str | None = Field(default=None, pattern=USER_FORM)
    key: str | None = Field(default=None, min_length=1, max_length=400)
    profile: str | None = None
    tags: tuple[Annotated[str, Field(pattern=NAME_FORM)], ...] = ()
    python: str | None = Field(default=None, pattern=PROGRAM_FORM)
    root: str | None = Field(default=None, pattern=ROOT_FORM)
    jump: str | None = Field(default=None, pattern=HOPS_FORM, max_length=400)
    pin: str | None = Field(default=None, pattern=PIN_FORM)


class _Written(_Shared):
    """A target, or a range of them, as it stands in the file."""

    host: str | None = Field(default=None, pattern=RANGED_HOST_FORM)
    group: str | None = Field(default=None, pattern=NAME_FORM)


class _Named(_Written):
    name: str = Field(pattern=RANGED_NAME_FORM)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal["edgevit.fleet/1"] = Field(alias="schema")
    groups: dict[Annotated[str, Field(pattern=NAME_FORM)], _Shared] = {}


class _Mapped(_File):
    targets: dict[Annotated[str, Field(pattern=RANGED_NAME_FORM)], _Written] = {}


class _Listed(_File):
    targets: tuple[_Named, ...] = ()


class Fleet(BaseModel):
    """The targets of one fleet file, in its order; ``local`` is not among them but always exists."""

    model_config = ConfigDict(frozen=True)
    path: Path
    targets: tuple[Target, ...]


def local_target() -> Target:
    """The agent on this machine, under this Python."""
    return Target(name=LOCAL, host="localhost", python=sys.executable or "python3", root=str(places.local_root()))


def load_fleet(path: Path) -> Fleet:
    """Read the fleet file; one that does not exist or is empty holds no targets. ConfigError with every problem at once."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Fleet(path=path, targets=())
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read: {e.strerror}"], hint=f"ls -l {path}") from e
    if not text.strip():
        return Fleet(path=path, targets=())
    document = load_yaml(path, max_bytes=MAX_FILE_BYTES, max_nodes=MAX_FILE_VALUES)
    problems: list[str] = []
    try:
        _validate(document)
    except ConfigError as e:
        problems += e.problems
    written, beyond = _resolve(document)
    problems += beyond
    targets = []
    for place, settings in written if not problems else ():
        try:
            targets.append(Target(**settings))
        except ValidationError as e:
            problems += [document.problem(place, f"{_where(one)}got {one['input']!r}: {one['msg']}") for one in e.errors()]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), hint=f"edit {path}")
    return Fleet(path=path, targets=tuple(targets))


def _where(error: Any) -> str:
    return f"{'.'.join(str(part) for part in error['loc'])}: "


def _validate(document: YamlDocument) -> None:
    value = document.value
    if isinstance(value, dict) and "targets" in value and value["targets"] is None:
        raise ConfigError([document.problem(("targets",), "is empty; write `targets: {}`")])
    listed = isinstance(value, dict) and isinstance(value.get("targets"), list)
    validate(document, _Listed if listed else _Mapped)


Place = tuple[str | int, ...]
Written = dict[str, Any]


def expand_range(text: str) -> list[str]:
    """``pi-[01-40]`` → pi-01 … pi-40, padded as the first number is; a text without a range is itself alone.

    ValueError where what stands in brackets is no range, or one that is too long or runs backwards.
    """
    parts = re.split(r"\[(\d{1,6})-(\d{1,6})\]", text)
    if len(parts) > 4:
        raise ValueError(f"got {text!r}; one range is allowed, not {len(parts) // 3}")
    if any(bracket in part for part in (parts[0], parts[-1]) for bracket in "[]"):
        raise ValueError(f"got {text!r}; a range is written as in pi-[01-40]")
    if len(parts) == 1:
        return [text]
    before, first, last, after = parts
    low, high = int(first), int(last)
    if high < low:
        raise ValueError(f"got [{first}-{last}], which ends before it begins")
    if high - low >= MAX_RANGE:
        raise ValueError(f"got [{first}-{last}], {high - low + 1:,} targets; at most {MAX_RANGE:,} are allowed")
    width = len(first) if first.startswith("0") else 0
    return [f"{before}{str(number).zfill(width)}{after}" for number in range(low, high + 1)]


def _resolve(document: YamlDocument) -> tuple[list[tuple[Place, Written]], list[str]]:
    """Every target with its group's defaults, ranges unfolded, in the file's order; and what is wrong beyond types: names used
    twice, the reserved name, groups and profiles that do not exist, no host."""
    value = document.value if isinstance(document.value, dict) else {}
    given = value.get("groups")
    groups: dict[str, Any] = given if isinstance(given, dict) else {}
    entries = _entries(value.get("targets"))
    problems = _check_profiles(document, [(("groups", name), group) for name, group in groups.items()])
    problems += _check_profiles(document, [(place, entry) for place, _, entry in entries])
    targets = []
    for place, member in _unfold(document, entries, problems):
        merged = _with_group(document, place, member, groups, problems)
        if not merged.get("host"):
            problems.append(document.problem(place, "host: this key is missing"))
        targets.append((place, merged))
    return targets, problems


def _unfold(
    document: YamlDocument, entries: Sequence[tuple[Place, str, Written]], problems: list[str]
) -> list[tuple[Place, Written]]:
    """One entry a target, in the file's order. An entry of its own for a name of a range says what is different there."""
    ranged = {place for place, name, _ in entries if "[" in name}
    position = {place: number for number, (place, _, _) in enumerate(entries)}
    found: dict[str, tuple[Place, Written]] = {}
    order: dict[str, int] = {}
    for place, name, entry in sorted(entries, key=lambda one: one[0] not in ranged):
        try:
            members = _members(name, entry)
        except ValueError as e:
            problems.append(document.problem(place, str(e)))
            continue
        for member in members:
            own = str(member["name"])
            if own == LOCAL:
                problems.append(
                    document.problem(place, f"{LOCAL!r} is this machine and always exists; give the box another name")
                )
            order[own] = min(order.get(own, len(entries)), position[place])
            if own not in found:
                found[own] = (place, member)
            elif place in ranged or found[own][0] not in ranged:
                problems.append(document.problem(place, f"a second target named {own!r}"))
            else:
                found[own] = (place, {**found[own][1], **member})
    return [found[name] for name in sorted(found, key=lambda name: order[name])]


def _with_group(document: YamlDocument, place: Place, member: Written, groups: dict[str, Any], problems: list[str]) -> Written:
    """A target's own settings over those of its group; the tags of both, and the group's name as one more."""
    own = {k: v for k, v in member.items() if k not in ("group", "tags")}
    tags = _tags(member)
    shared: Written = {}
    group = member.get("group")
    if isinstance(group, str):
        if isinstance(groups.get(group), dict):
            shared = {k: v for k, v in groups[group].items() if v is not None}
        else:
            problems.append(document.problem((*place, "group"), str(UnknownName("group", group, groups))))
        tags = [*_tags(shared), group, *tags]
    return {**shared, **own, "tags": tuple(dict.fromkeys(tags))}


def _tags(settings: Written) -> list[str]:
    tags = settings.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _entries(targets: Any) -> list[tuple[Place, str, Written]]:
    if isinstance(targets, dict):
        return [(("targets", str(k)), str(k), v) for k, v in targets.items() if isinstance(v, dict)]
    if isinstance(targets, list):
        rows = [(("targets", i), v) for i, v in enumerate(targets) if isinstance(v, dict)]
        return [(place, v["name"], v) for place, v in rows if isinstance(v.get("name"), str)]
    return []


def _members(name: str, entry: Written) -> list[Written]:
    """The targets that one entry stands for. ValueError where its ranges do not go together."""
    settings = {k: v for k, v in entry.items() if v is not None and k != "name"}
    names = expand_range(name)
    host = settings.get("host")
    if not isinstance(host, str):
        return [{**settings, "name": own} for own in names]
    hosts = expand_range(host)
    if len(hosts) != len(names):
        raise ValueError(
            f"{name!r} names {len(names):,} targets, its host {host!r} {len(hosts):,}; write the same range in both"
        )
    return [{**settings, "name": own, "host": address} for own, address in zip(names, hosts, strict=True)]


def _check_profiles(document: YamlDocument, entries: Sequence[tuple[Place, Any]]) -> list[str]:
    from edgevit.profile import list_profiles

    known = list(list_profiles())
    return [
        document.problem((*place, "profile"), str(UnknownName("profile", entry["profile"], known)))
        for place, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("profile"), str) and entry["profile"] not in known
    ]


def select(fleet: Fleet, patterns: Sequence[str]) -> list[Target]:
    """Targets by name, pattern (``pi*``, ``pi-[01-40]``), ``tag:x`` or ``profile:y``, each once, in the fleet's order with
    ``local`` first.

    UnknownName where a name is not there, UsageError where a pattern matches nothing or nothing was asked for: an empty
    selection never means "all".
    """
    if not patterns:
        raise UsageError("no target given", hint="edgevit target list")
    everything = [local_target(), *fleet.targets]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _matching(everything, pattern)
        if not matched:
            kind, colon, value = pattern.partition(":")
            if colon and kind == "tag":
                tags = dict.fromkeys(tag for t in everything for tag in t.tags)
                raise UnknownName("tag", value, tags, hint="edgevit target list")
            if re.search(r"[*?\[]", pattern) or ":" in pattern:
                raise UsageError(f"no target matches {pattern!r}", hint="edgevit target list")
            raise UnknownName("target", pattern, [t.name for t in everything], hint="edgevit target list")
        chosen.update(matched)
    return [t for t in everything if t.name in chosen]


def _matching(targets: Sequence[Target], pattern: str) -> set[str]:
    kind, colon, value = pattern.partition(":")
    if colon and kind == "tag":
        return {t.name for t in targets if value in t.tags}
    if colon and kind == "profile":
        return {t.name for t in targets if t.profile == value}
    return names_matching([t.name for t in targets], pattern)


def names_matching(names: Sequence[str], pattern: str) -> set[str]:
    """Those of ``names`` that a pattern means. A range in it is one as in the fleet file: to fnmatch ``[1-40]`` is a single
    character, and would be four targets of forty."""
    try:
        patterns = expand_range(pattern)
    except ValueError:
        patterns = [pattern]
    if not re.search(r"[*?\[]", patterns[0]):
        return set(patterns).intersection(names)
    return {name for name in names if any(fnmatch.fnmatchcase(name, one) for one in patterns)}


# --------------------------------------------------------------------------------------------------------------------
# Changing the file: what a person wrote around the entries stays
# --------------------------------------------------------------------------------------------------------------------


def make_target(**settings: Any) -> Target:
    """A Target from what a person typed. UsageError with every setting that is wrong."""
    try:
        return Target(**settings)
    except ValidationError as e:
        problems = [f"{'.'.join(str(p) for p in one['loc'])}: got {one['input']!r}: {one['msg']}" for one in e.errors()]
        raise UsageError("; ".join(problems), hint="edgevit target add --help") from e


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Alone at the file; UsageError where it cannot be written."""
    try:
        with only_writer(path):
            yield
    except OSError as e:
        raise UsageError(f"{path}: cannot be written: {e.strerror}", hint=f"ls -ld {path.parent}; df -h {path.parent}") from e


def add_target(path: Path, target: Target) -> None:
    """Add one target to the file (made where absent), keeping comments and order. UsageError where the name is taken."""
    # Through a link to the file itself: people keep such files in a repository.
    path = path.resolve()
    with _changing(path):
        fleet = load_fleet(path)
        if target.name == LOCAL or any(t.name == target.name for t in fleet.targets):
            raise UsageError(f"a target named {target.name} exists already", hint=f"edgevit target remove {target.name}")
        defaults = {name: f.default for name, f in Target.model_fields.items()}
        entry = {k: v for k, v in target.model_dump(mode="json").items() if v != defaults[k] and v not in (None, [])}
        document = _round_trip(path)
        targets = document.get("targets")
        if isinstance(targets, list):
            targets.append(entry)
        else:
            entry.pop("name")
            if targets is None:
                targets = document["targets"] = {}
            targets[target.name] = entry
        _save(path, document)


def remove_target(path: Path, name: str) -> None:
    """Take one target out of the file. UnknownName where it is not there."""
    path = path.resolve()
    with _changing(path):
        fleet = load_fleet(path)
        if all(t.name != name for t in fleet.targets):
            raise UnknownName("target", name, [t.name for t in fleet.targets], hint="edgevit target list")
        document = _round_trip(path)
        targets = document["targets"]
        if name not in ([t.get("name") for t in targets] if isinstance(targets, list) else targets):
            raise UsageError(f"{name} is one of a range in {path}; it cannot be taken out of it alone", hint=f"edit {path}")
        if isinstance(targets, list):
            targets[:] = [t for t in targets if t.get("name") != name]
        else:
            del targets[name]
        _save(path, document)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _round_trip(path: Path) -> Any:
    if path.exists() and path.read_bytes().strip():
        return _yaml().load(path.read_text("utf-8-sig"))
    return _yaml().load(f"schema: {SCHEMA}\ntargets:\n")


def _save(path: Path, document: Any) -> None:
    buffer = io.StringIO()
    _yaml().dump(document, buffer)
    write_private(path, buffer.getvalue().encode("utf-8"))
    load_fleet(path)
