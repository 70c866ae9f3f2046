"""The fleet file: which boxes there are, and which of them a person means.

::

    schema: edgevit.fleet/1
    targets:
      kitchen:                      # or a list of entries with `name:`
        host: 192.168.1.20
        user: pi
        profile: raspberry-pi-4b
        tags: [lab]
"""

from __future__ import annotations

import fnmatch
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgevit import places
from edgevit.errors import ConfigError, UnknownName, UsageError
from edgevit.transport.hostkeys import only_writer, write_private
from edgevit.yamlsource import YamlDocument, load_yaml, validate

SCHEMA = "edgevit.fleet/1"
LOCAL = "local"
NAME_FORM = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
HOST_FORM = r"^[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,254}$"
USER_FORM = r"^[A-Za-z0-9_.][A-Za-z0-9_.@$\\+-]{0,99}$"
HOPS_FORM = r"^[^\s,-][^\s,]*(,[^\s,-][^\s,]*)*$"
# One program, no arguments and no control characters; `~` in a root is the login's home on the device.
PROGRAM_FORM = r"^[^\s\x00-\x1f-][^\x00-\x1f]{0,399}$"
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


class Target(_Entry):
    """One real box. ``python`` and ``root`` are what they are called there; ``jump``
    lists hops as ``ssh -J`` takes them."""

    name: str = Field(pattern=NAME_FORM)

    @property
    def is_local(self) -> bool:
        """The agent in a process on this machine, without SSH."""
        return self.name == LOCAL


class _Mapped(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal["edgevit.fleet/1"] = Field(alias="schema")
    targets: dict[Annotated[str, Field(pattern=NAME_FORM)], _Entry] = {}


class _Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal["edgevit.fleet/1"] = Field(alias="schema")
    targets: tuple[Target, ...] = ()


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
    document = load_yaml(path)
    problems: list[str] = []
    targets: tuple[Target, ...] = ()
    try:
        targets = _read_targets(document)
    except ConfigError as e:
        problems += e.problems
    problems += _check_beyond_types(document)
    if problems:
        raise ConfigError(problems, hint=f"edit {path}")
    return Fleet(path=path, targets=targets)


def _read_targets(document: YamlDocument) -> tuple[Target, ...]:
    value = document.value
    if isinstance(value, dict) and isinstance(value.get("targets"), list):
        return validate(document, _Listed).targets
    if isinstance(value, dict) and "targets" in value and value["targets"] is None:
        raise ConfigError([document.problem(("targets",), "is empty; write `targets: {}`")])
    found = validate(document, _Mapped).targets
    return tuple(Target(name=name, **entry.model_dump()) for name, entry in found.items())


def _check_beyond_types(document: YamlDocument) -> list[str]:
    """Names used twice, the reserved name, profiles that do not exist."""
    from edgevit.profile import list_profiles

    targets = document.value.get("targets") if isinstance(document.value, dict) else None
    if isinstance(targets, dict):
        entries: list[tuple[Any, Any, tuple[str | int, ...]]] = [(k, v, ("targets", str(k))) for k, v in targets.items()]
    elif isinstance(targets, list):
        entries = [(v.get("name"), v, ("targets", i)) for i, v in enumerate(targets) if isinstance(v, dict)]
    else:
        return []
    problems, seen = [], set()
    known = list(list_profiles())
    for name, entry, place in entries:
        if name == LOCAL:
            problems.append(document.problem(place, f"{LOCAL!r} is this machine and always exists; give the box another name"))
        if name in seen:
            problems.append(document.problem(place, f"a second target named {name!r}"))
        seen.add(name)
        profile = entry.get("profile") if isinstance(entry, dict) else None
        if isinstance(profile, str) and profile not in known:
            problems.append(document.problem((*place, "profile"), str(UnknownName("profile", profile, known))))
    return problems


def select(fleet: Fleet, patterns: Sequence[str]) -> list[Target]:
    """Targets by name, pattern (``pi*``), ``tag:x`` or ``profile:y``, each once, in the fleet's order with ``local`` first.

    UnknownName where a name is not there, UsageError where a pattern matches nothing or nothing was asked for: an empty
    selection never means "all".
    """
    if not patterns:
        raise UsageError("no target given", hint="edgevit target list")
    everything = [local_target(), *fleet.targets]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [t.name for t in everything if _matches(t, pattern)]
        if not matched:
            if re.search(r"[*?\[]", pattern) or ":" in pattern:
                raise UsageError(f"no target matches {pattern!r}", hint="edgevit target list")
            raise UnknownName("target", pattern, [t.name for t in everything], hint="edgevit target list")
        chosen.update(matched)
    return [t for t in everything if t.name in chosen]


def _matches(target: Target, pattern: str) -> bool:
    kind, colon, value = pattern.partition(":")
    if colon and kind == "tag":
        return value in target.tags
    if colon and kind == "profile":
        return target.profile == value
    return fnmatch.fnmatchcase(target.name, pattern)


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


def add_target(path: Path, target: Target) -> None:
    """Add one target to the file (made where absent), keeping comments and order. UsageError where the name is taken."""
    # Through a link to the file itself: people keep such files in a repository.
    path = path.resolve()
    with only_writer(path):
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
    with only_writer(path):
        fleet = load_fleet(path)
        if all(t.name != name for t in fleet.targets):
            raise UnknownName("target", name, [t.name for t in fleet.targets], hint="edgevit target list")
        document = _round_trip(path)
        targets = document["targets"]
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
    text = buffer.getvalue()
    try:
        write_private(path, text.encode("utf-8"))
    except OSError as e:
        raise UsageError(f"{path}: cannot be written: {e.strerror}", hint=f"ls -ld {path.parent}") from e
    load_fleet(path)
