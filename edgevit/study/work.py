"""What the worker processes of a study do: look at a model, build a cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device_agents import wire
from edgevit.build import BuildRequest
from edgevit.model import ModelSource
from edgevit.progress import Progress
from edgevit.study.plan import KnownModel


@dataclass(frozen=True)
class Examine:
    """Load ``source`` and ask every kind of step in ``kinds`` whether it applies."""

    source: ModelSource
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class BuildCell:
    """Build ``request`` into ``out`` and sign it with the private key at ``key``; ``identity`` stands for the model.

    ``profiles`` holds the request's profiles as JSON: their generic classes cannot be pickled.
    """

    request: BuildRequest
    profiles: tuple[str, ...]
    out: Path
    key: Path
    identity: str


@dataclass(frozen=True)
class CellBuilt:
    """The bundle's digest and its manifest as JSON values, and whether the cache had it."""

    digest: str
    manifest: Any
    reused: bool


def to_build(request: BuildRequest, out: Path, key: Path, identity: str) -> BuildCell:
    """The task as it can cross to another process."""
    profiles = tuple(p.model_dump_json() for p in request.profiles)
    return BuildCell(replace(request, profiles=()), profiles, out, key, identity)


def examine(task: Examine, progress: Progress) -> KnownModel:
    """Whether steps apply, from the loaded model. Raises :class:`ModelError` where it cannot be loaded."""
    from edgevit.compress import why_not
    from edgevit.model import load_model

    progress.start("model", f"looking at {task.source.name}")
    model = load_model(task.source)
    reasons = {kind: why_not(model.module, [kind]) for kind in task.kinds}
    progress.finish("model", f"{model.info.parameters:,} parameters, {model.info.classes} classes")
    return KnownModel(model.info.digest, {kind: reason for kind, reason in reasons.items() if reason})


def build_cell(task: BuildCell, progress: Progress) -> CellBuilt:
    """One cell's bundle, as :func:`edgevit.build.build_bundle` makes it."""
    from edgevit import signing
    from edgevit.build import make_bundle
    from edgevit.profile_model import Profile

    request = replace(task.request, profiles=tuple(Profile.model_validate_json(p) for p in task.profiles))
    made = make_bundle(request, task.out, lambda data: signing.sign(data, task.key), progress, task.identity)
    return CellBuilt(made.bundle.digest, wire.encode(made.bundle.manifest), made.reused)


def make_digits(folder: Path, progress: Progress) -> None:
    """The digits example in ``folder``, as :func:`edgevit.digits.ensure_digits` makes it."""
    from edgevit.digits import ensure_digits

    ensure_digits(folder, progress)
