"""Kinds of boards: what is known of each, with its source, as frozen values read from ``profiles/*.yaml``.

A profile says what is worth *trying* on a kind of board and the ceilings a file must stay under to run on the oldest of
them; what one box really has is :class:`device_agents.wire.Facts`. Every fact carries where it comes from and whether it was
measured, is documented, or is unproven.

pydantic is loaded with the models (:func:`load_profile`); :func:`list_profiles` and :func:`profile_titles` do without it, so
that a listing is instant.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.profile_model import OnnxRuntimeCeiling, Profile, RuntimeOption

__all__ = [
    "Finding",
    "OnnxRuntimeCeiling",
    "Profile",
    "RuntimeOption",
    "check_target_profile",
    "list_profiles",
    "load_profile",
    "onnx_ceiling",
    "profile_schema",
    "profile_titles",
    "propose_profile",
]

GENERIC_BY_MACHINE = {
    "x86_64": "generic-x86-64",
    "amd64": "generic-x86-64",
    "aarch64": "generic-arm64",
    "arm64": "generic-arm64",
}


def __getattr__(name: str) -> Any:
    if name in ("Profile", "RuntimeOption", "OnnxRuntimeCeiling"):
        from edgevit import profile_model

        return getattr(profile_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Finding:
    """Something that does not go together. ``severity``: ``error`` (it is another board, or cannot work) or ``warning``."""

    severity: str
    message: str
    hint: str = ""


def profiles_dir() -> Traversable:
    """Where the shipped profiles lie: inside the installed package, or in the checkout of an editable install."""
    packaged = resources.files("edgevit") / "_profiles"
    if packaged.is_dir():
        return packaged
    beside = Path(__file__).resolve().parent.parent / "profiles"
    if beside.is_dir():
        return beside
    raise ConfigError([f"{packaged}: no profiles here, nor in {beside}"], hint="pip install --force-reinstall edgevit")


def list_profiles() -> list[str]:
    """The names of the shipped profiles, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in profiles_dir().iterdir() if f.name.endswith(".yaml"))


def profile_titles() -> dict[str, str]:
    """Name → title, read without a YAML parser: each file has a plain ``title:`` line (a test holds them to it)."""
    titles = {}
    for name in list_profiles():
        found = re.search(r"^title: (.+)$", (profiles_dir() / f"{name}.yaml").read_text("utf-8"), re.MULTILINE)
        titles[name] = found.group(1).strip() if found else ""
    return titles


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a person's own by path (anything that ends in ``.yaml`` or holds a ``/``).

    Raises :class:`UnknownName` with the nearest names, or :class:`ConfigError` with every problem of the file.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return _read(Path(name))
    return _load_shipped(name)


@functools.cache
def _load_shipped(name: str) -> Profile:
    """Read once a process: which profile a board has is asked for every run of a fleet."""
    known = list_profiles()
    if name not in known:
        raise UnknownName("profile", name, known, hint="edgevit profiles")
    return _read(profiles_dir() / f"{name}.yaml")


def _read(source: Path | Traversable) -> Profile:
    from edgevit.profile_model import Profile
    from edgevit.yamlsource import load_yaml, validate

    document = load_yaml(source)
    profile = validate(document, Profile)
    stem = source.name.rsplit(".", 1)[0]
    if profile.name != stem:
        raise ConfigError([document.problem(("name",), f"got {profile.name!r}, expected {stem!r} as the file is called")])
    return profile


def propose_profile(facts: Facts) -> str | None:
    """The profile whose board model fits the board's own string, else the generic one of its machine, else None."""
    if facts.board_model:
        # The firmware ends the string with a NUL; the agent strips it, a recorded case may not.
        model = facts.board_model.strip("\0 \n")
        for name in list_profiles():
            pattern = load_profile(name).board_model
            if pattern is not None and re.search(pattern.value, model):
                return name
    return GENERIC_BY_MACHINE.get(facts.machine.lower())


def check_target_profile(profile: Profile, facts: Facts) -> list[Finding]:
    """What of ``facts`` contradicts ``profile``; empty where they go together. Absent facts contradict nothing."""
    found: list[Finding] = []
    if facts.machine.lower() not in [m.lower() for m in profile.machines]:
        expected = " or ".join(profile.machines)
        hint = f"--profile {GENERIC_BY_MACHINE.get(facts.machine.lower(), 'NAME')}"
        found.append(Finding("error", f"machine: got {facts.machine}, the profile {profile.name} expects {expected}", hint))
    if profile.board_model is not None and facts.board_model:
        model = facts.board_model.strip("\0 \n")
        if not re.search(profile.board_model.value, model):
            proposal = propose_profile(facts)
            message = f"board: it calls itself {model!r}, which is not a {profile.title}"
            found.append(Finding("error", message, f"--profile {proposal}" if proposal else "edgevit profiles"))
    if _version(facts.python) < _version(profile.min_python.value):
        message = f"Python: got {facts.python}, {profile.name} needs {profile.min_python.value} or newer"
        found.append(Finding("error", message, profile.python_hint))
    # A 32-bit system names its features otherwise (neon for asimd), so only the first machine's names are compared.
    if facts.cpu_features and facts.machine == profile.machines[0]:
        have = set(facts.cpu_features)
        gone = [f for f in profile.isa.has if f not in have]
        extra = [f for f in profile.isa.lacks if f in have]
        if gone:
            found.append(Finding("warning", f"CPU features the profile names and the device does not list: {', '.join(gone)}"))
        if extra:
            found.append(Finding("warning", f"CPU features the profile calls absent and the device lists: {', '.join(extra)}"))
    if facts.memory_mb is not None and profile.memory_mb is not None:
        largest = max(profile.memory_mb.value)
        if facts.memory_mb > largest * 1.1:
            message = f"memory: got {facts.memory_mb:,} MB, the largest {profile.title} has {largest:,} MB"
            found.append(Finding("warning", message))
    return found


def onnx_ceiling(profiles: list[Profile] | tuple[Profile, ...]) -> OnnxRuntimeCeiling | None:
    """The lowest IR version and opset over every onnxruntime these profiles may meet; None where none uses it."""
    ceilings = [o.ceiling for p in profiles for o in p.runtimes if o.ceiling is not None]
    if not ceilings:
        return None
    from edgevit.profile_model import OnnxRuntimeCeiling

    oldest = min((o for p in profiles for o in p.runtimes if o.ceiling), key=lambda o: _version(o.oldest))
    return OnnxRuntimeCeiling(
        ir_version=min(c.ir_version for c in ceilings), opset=min(c.opset for c in ceilings), runtime_version=oldest.oldest
    )


def profile_schema() -> dict[str, Any]:
    """JSON Schema of a profile file, for editors."""
    from edgevit.profile_model import Profile

    return Profile.model_json_schema()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
