"""A candidate: one draw, what became of it on the host, and how it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgevit.recipe import Recipe
from edgevit.tune.latency import Kind
from edgevit.tune.limits import Reached

State = Literal["passed", "misses", "n/a", "too long", "failed"]


@dataclass(frozen=True)
class Candidate:
    """``state``: ``passed`` (worth measuring), ``misses`` (a limit, as counted here), ``n/a``, ``too long`` (its training
    does not fit into what is left) or ``failed``; ``reason`` says why it is not ``passed``.

    ``loss`` in points of top-1 to the fp32 baseline over the same images, counted on the exported file on this machine;
    ``lost`` and ``gained``: images that only the baseline, and only this candidate, gets right. ``bundle`` and ``artifact`` are
    digests. ``size_mb`` of one that was not built since it would be too large: the least it could have.
    """

    number: int
    recipe: Recipe
    format: str
    threads: int
    label: str
    state: State
    reason: str = ""
    bundle: str = ""
    artifact: str = ""
    parameters: int = 0
    macs: int = 0
    size_mb: float = 0.0
    top1: float = 0.0
    images: int = 0
    loss: float = 0.0
    lost: int = 0
    gained: int = 0
    training_s: float = 0.0
    """About how long its training takes here, of one that is too long; else 0."""
    hopeless: Mapping[str, str] = field(default_factory=dict)
    """Targets it is not measured on, each with the reason."""

    @property
    def key(self) -> str:
        return f"{self.recipe.name} {self.threads}"

    @property
    def scheme(self) -> str:
        (scheme,) = self.recipe.schemes
        return scheme

    @property
    def kind(self) -> Kind:
        """What its latency is predicted by."""
        return self.format, self.scheme, self.threads, any(s.kind == "merge_tokens" for s in self.recipe.steps)

    @property
    def built(self) -> bool:
        return bool(self.bundle)

    @property
    def reached(self) -> Reached:
        """What is known of it on the host."""
        return Reached(loss=self.loss, size_mb=self.size_mb) if self.built else Reached(size_mb=self.size_mb or None)


def to_json(candidate: Candidate) -> dict[str, Any]:
    """As it is kept with its trial."""
    values = {f.name: getattr(candidate, f.name) for f in dataclasses.fields(Candidate)}
    values["recipe"] = candidate.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values["hopeless"] = dict(candidate.hopeless)
    return values


def from_json(values: Mapping[str, Any]) -> Candidate:
    """The inverse of :func:`to_json`. Raises ``ValidationError`` (pydantic) or ``TypeError`` for anything else."""
    return Candidate(**{**values, "recipe": Recipe.model_validate(values["recipe"])})
