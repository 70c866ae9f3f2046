"""The cells of a study, and which of them can apply: decided from files and structure alone, before any work starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from device_agents import wire
from edgevit.artifacts import fitting_profiles
from edgevit.build import BuildRequest, build_key, bundle_name, code_digest
from edgevit.cache import Cache, digest_of, tool_versions
from edgevit.export import cannot_carry_out
from edgevit.images import DataSets, lacks_data, open_sets
from edgevit.profile import Profile
from edgevit.recipe import Recipe
from edgevit.study.file import Study, StudyModel


@dataclass(frozen=True)
class Cell:
    """One recipe on one model in one format. ``not_applicable`` holds why it cannot apply, or is empty."""

    model: StudyModel
    recipe: Recipe
    format: str
    request: BuildRequest
    not_applicable: str = ""

    @property
    def name(self) -> str:
        return f"{self.model.title} {self.recipe.name} {self.format}"

    @property
    def scheme(self) -> str:
        """The precision; the recipes of a study have one each."""
        (scheme,) = self.recipe.schemes
        return scheme

    @property
    def folder(self) -> str:
        """Where the cell's bundle lies below the study's folder."""
        return f"{_safe(self.model.title)}/{self.recipe.name}-{self.format}"

    @property
    def shares(self) -> frozenset[str]:
        """Pieces of work that this cell may have in common with others, each kept once it is done: the float export and every
        beginning of its structural steps. Two cells with an open piece in common would do it twice at the same time."""
        steps = [[s.kind, s.config.model_dump(mode="json")] for s in self.recipe.steps[:-1]]
        begun = [digest_of(self.model.title, steps[: i + 1]) for i in range(len(steps))]
        return frozenset([*begun, digest_of(self.model.title, steps, self.format)])


@dataclass(frozen=True)
class KnownModel:
    """What stands for a model's weights and structure, and why kinds of step cannot apply to it, by kind and variety."""

    identity: str
    not_applicable: Mapping[str, str]


@dataclass(frozen=True)
class Known:
    """A cell that was built before: its manifest as signed, and its bundle's digest."""

    digest: str
    manifest: wire.Manifest


def plan_cells(study: Study, profiles: Sequence[Profile]) -> list[Cell]:
    """Every cell in the order of the file: models, then formats, then recipes; applicable as far as formats and boards say."""
    cells = []
    for model in study.models:
        for format_ in study.formats:
            for recipe in study.recipes:
                request = BuildRequest(
                    model.source, recipe, tuple(profiles), (format_,), model.eval, model.calib, model.train, study.batch
                )
                name = _bundle_name(request, model)
                cell = Cell(model, recipe, format_, replace(request, name=name))
                cells.append(replace(cell, not_applicable=format_reason(format_, recipe, profiles)))
    return cells


def format_reason(format_: str, recipe: Recipe, profiles: Sequence[Profile]) -> str:
    """Why no file of ``format_`` can carry out ``recipe`` on any of ``profiles``, or nothing."""
    (config,) = recipe.quantizations
    reason = cannot_carry_out(format_, config.scheme, config.group)
    if not reason and not fitting_profiles(format_, config.scheme, profiles):
        return f"no runtime of {', '.join(p.name for p in profiles)} runs {format_} {config.scheme}"
    return reason


def with_data(cells: Sequence[Cell], sets: Mapping[str, DataSets]) -> list[Cell]:
    """The cells, those not applicable that lack images; ``sets`` by the model's title."""
    out = []
    for cell in cells:
        lacking = None if cell.not_applicable else lacks_data(cell.recipe, sets[cell.model.title])
        out.append(replace(cell, not_applicable=lacking[0]) if lacking else cell)
    return out


def with_models(cells: Sequence[Cell], models: Mapping[str, KnownModel]) -> list[Cell]:
    """The cells, those not applicable whose steps cannot apply to their model; ``models`` by title."""
    out = []
    for cell in cells:
        known = models.get(cell.model.title)
        if cell.not_applicable or known is None:
            out.append(cell)
            continue
        reasons = [known.not_applicable.get(s.varied_kind, "") for s in cell.recipe.steps]
        out.append(replace(cell, not_applicable=next((r for r in reasons if r), "")))
    return out


def kinds_of(cells: Sequence[Cell], title: str) -> list[str]:
    """Every kind of step, with its variety, that the applicable cells of one model have."""
    return sorted({s.varied_kind for c in cells if c.model.title == title and not c.not_applicable for s in c.recipe.steps})


def model_sets(study: Study, cache: Cache) -> dict[str, DataSets]:
    """The image sets of each model by title, listed once. Raises :class:`DataError` where one cannot be."""
    first = study.recipes[0]
    return {m.title: open_sets(BuildRequest(m.source, first, (), (), m.eval, m.calib, m.train), cache) for m in study.models}


def known_model(model: StudyModel, kinds: Sequence[str], cache: Cache) -> KnownModel | None:
    """What an earlier study found out about the model, where its weights can be told without loading it."""
    identity = model.source.fast_digest(cache)
    if identity is None:
        return None
    entry = cache.get(_model_key(identity, kinds))
    return None if entry is None else KnownModel(identity, entry.meta["not_applicable"])


def keep_model(model: StudyModel, found: KnownModel, kinds: Sequence[str], cache: Cache) -> KnownModel:
    """Remember ``found`` for :func:`known_model`; with the identity that builds know the model by."""
    identity = model.source.fast_digest(cache)
    if identity is None:
        return found
    cache.put(_model_key(identity, kinds), {}, {"not_applicable": dict(found.not_applicable)})
    return replace(found, identity=identity)


def _model_key(identity: str, kinds: Sequence[str]) -> str:
    return digest_of("steps that apply", identity, list(kinds), code_digest(), tool_versions())


def cell_key(cell: Cell, identity: str, sets: DataSets) -> str:
    """What stands for everything the cell is built from."""
    return digest_of("study cell", build_key(cell.request, identity, sets))


def find_known(key: str, cache: Cache) -> Known | None:
    """The cell ``key`` stands for, where it was built before."""
    entry = cache.get(key)
    if entry is None:
        return None
    return Known(str(entry.meta["digest"]), wire.decode(wire.Manifest, entry.meta["manifest"], "manifest of a cell"))


def keep_known(key: str, known: Known, cache: Cache) -> None:
    cache.put(key, {}, {"digest": known.digest, "manifest": wire.encode(known.manifest)})


def startable(waiting: Sequence[Cell], running: Collection[Cell], done: Collection[str]) -> int | None:
    """Index of the first waiting cell that has no open piece of work in common with a running one; None where there is none."""
    busy = {piece for cell in running for piece in cell.shares} - set(done)
    return next((i for i, cell in enumerate(waiting) if not cell.shares & busy), None)


def _bundle_name(request: BuildRequest, model: StudyModel) -> str:
    """A name of this cell alone: bundles of one name share one line of versions."""
    asked: list[Any] = [vars(model), request.recipe.digest, request.batch, [p.name for p in request.profiles]]
    short = digest_of(asked)[:8]
    return bundle_name(model.title, f"{request.recipe.name}-{request.formats[0]}-{short}")


def _safe(text: str) -> str:
    return bundle_name(text, "").rstrip(".") or "model"
