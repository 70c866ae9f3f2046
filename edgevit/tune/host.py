"""What can be told of candidates on this machine: whether they apply, export and agree with the model, and what their exported
files get right. Everything slow comes from the cache where it was done before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from device_agents import wire
from edgevit.build import BuildRequest, code_digest
from edgevit.bundle import Bundle
from edgevit.cache import Cache, digest_of, tool_versions
from edgevit.engines import Engine, run_all
from edgevit.errors import BuildError
from edgevit.images import DataSets, lacks_data, open_sets
from edgevit.model import ModelSource
from edgevit.profile import Profile
from edgevit.progress import Progress, Quiet
from edgevit.study.file import StudyModel
from edgevit.study.grid import CellResult, build_cells
from edgevit.study.plan import Cell, KnownModel, cell_key, find_known, format_reason, with_models
from edgevit.study.rows import pair, size_after
from edgevit.tune.candidate import Candidate
from edgevit.tune.limits import Limits, misses
from edgevit.tune.size import Bulk
from edgevit.tune.space import Drawn
from edgevit.tune.work import Score, Survey, score, survey
from edgevit.workers import Failure, Task


@dataclass(frozen=True)
class Asked:
    """The model with its images, the boards it is for, and who signs."""

    model: StudyModel
    profiles: tuple[Profile, ...]
    batch: int
    key: Path

    def request(self, drawn: Drawn) -> BuildRequest:
        """The build that `edgevit build` with the same recipe file and options asks for, to the digit."""
        m = self.model
        return BuildRequest(m.source, drawn.recipe, self.profiles, (drawn.format,), m.eval, m.calib, m.train, self.batch)


@dataclass(frozen=True)
class _Counted:
    """Predictions and labels of the evaluation images."""

    predictions: tuple[int, ...]
    labels: tuple[int, ...]


class Host:
    """Builds and scores candidates of the model that ``survey`` looked at through ``engine``; bundles lie below ``root``."""

    def __init__(
        self, asked: Asked, survey: Survey, engine: Engine, cache: Cache, root: Path, progress: Progress, limits: Limits
    ) -> None:
        self.asked, self.engine, self.cache, self.root, self.progress = asked, engine, cache, root, progress
        self.survey, self.limits = survey, limits
        self.sets: DataSets = open_sets(
            BuildRequest(asked.model.source, _no_recipe(), (), (), asked.model.eval, asked.model.calib, asked.model.train),
            cache,
        )
        self._base: _Counted | None = None

    def baseline(self, number: int, drawn: Drawn) -> Candidate:
        """The float candidate that all others are held against. Raises :class:`BuildError` where it cannot be made."""
        (made,) = self.evaluate([(number, drawn)], 0.0)
        if made.state == "failed" or not made.built:
            raise BuildError(f"the fp32 baseline cannot be made: {made.reason}", hint="edgevit build … --recipe fp32")
        return replace(made, state="passed", reason="")

    def evaluate(self, drawn: Sequence[tuple[int, Drawn]], training_s: float) -> list[Candidate]:
        """Every draw through the gates of this machine, in the order given: it applies, its training takes at most
        ``training_s`` seconds, it is built (exported, read back, held against the model), and its file keeps the limits of loss
        and size."""
        bare = {number: _bare(number, one) for number, one in drawn}
        cells: dict[int, Cell] = {}
        for number, one in drawn:
            reason, wanted = self._not_applicable(one), training_seconds(one, self.survey)
            if reason:
                bare[number] = replace(bare[number], state="n/a", reason=reason)
            elif wanted > max(0.0, training_s):
                said = f"its training takes about {wanted / 60:.1f} minutes, one may take {max(0.0, training_s) / 60:.1f}"
                bare[number] = replace(bare[number], state="too long", reason=said, training_s=wanted)
            else:
                cells[number] = self._cell(one)
        title = self.asked.model.title
        unique = {cell.name: cell for cell in cells.values()}
        models, sets = {title: self.survey.known}, {title: self.sets}
        built = build_cells(
            list(unique.values()), models, sets, self.root, self.asked.key, self.engine, self.cache, self.progress
        )
        counted = self._count(built)
        return [
            self._judged(bare[number], built[cells[number].name], counted) if number in cells else bare[number]
            for number, _ in drawn
        ]

    def pack(self, candidate: Candidate, place: Path) -> Bundle:
        """The candidate's bundle in ``place``, from the cache, else built again. BuildError where it is another than the one
        that was counted: what is measured of it would never be found under the candidate."""
        from edgevit import signing
        from edgevit.build import make_bundle

        drawn = Drawn(candidate.recipe, candidate.format, candidate.threads, candidate.label)
        key = self.asked.key
        identity = self.survey.known.identity
        # The version that was counted: since then another search may have built bundles of the same name.
        known = find_known(cell_key(self._cell(drawn), identity, self.sets), self.cache)
        version = None if known is None else known.manifest.version
        bundle = make_bundle(
            self.asked.request(drawn), place, lambda d: signing.sign(d, key), Quiet(), identity, version
        ).bundle
        if bundle.digest != candidate.bundle:
            raise BuildError(
                f"{candidate.label}: packed anew it is bundle {bundle.digest}, and {candidate.bundle} was counted; the "
                "program or what it builds from changed while the search ran",
                hint="type the command again: it is another search now",
            )
        return bundle

    def _not_applicable(self, drawn: Drawn) -> str:
        """Why this machine cannot even begin with it, or nothing."""
        reason = format_reason(drawn.format, drawn.recipe, self.asked.profiles)
        lacking = None if reason else lacks_data(drawn.recipe, self.sets)
        if reason or lacking:
            return reason or (lacking[0] if lacking else "")
        (cell,) = with_models([self._cell(drawn)], {self.asked.model.title: self.survey.known})
        return cell.not_applicable

    def _cell(self, drawn: Drawn) -> Cell:
        return Cell(self.asked.model, drawn.recipe, drawn.format, self.asked.request(drawn))

    def _count(self, built: Mapping[str, CellResult]) -> dict[str, _Counted | Failure]:
        """Predictions of each cell that was built, by its name."""
        tasks = []
        for name, result in built.items():
            if result.known is not None:
                manifest = result.known.manifest
                if manifest.evaluation is None:
                    raise BuildError(f"{name} was built without evaluation images", hint="edgevit tune … --eval DATA")
                artifact, preprocessing = wire.encode(manifest.artifacts[0]), wire.encode(manifest.preprocessing)
                tasks.append(Task(name, score, Score(artifact, preprocessing, manifest.evaluation.images.sha256)))
        found: dict[str, _Counted | Failure] = {}
        for outcome in run_all(self.engine, tasks, self.progress):
            name = outcome.task.name
            known = built[name].known
            if outcome.failure is not None or known is None or known.manifest.evaluation is None:
                found[name] = outcome.failure or Failure("BuildError", "it was not scored")
            else:
                found[name] = _Counted(outcome.value, self._labels(known.manifest.evaluation.labels.sha256))
        return found

    def _labels(self, sha256: str) -> tuple[int, ...]:
        import numpy as np

        return tuple(int(y) for y in np.load(self.cache.blob_path(sha256), allow_pickle=False))

    def _judged(self, bare: Candidate, result: CellResult, counted: Mapping[str, _Counted | Failure]) -> Candidate:
        """The candidate with what was built and counted of it."""
        if result.failure is not None or result.known is None:
            failure = result.failure or Failure("BuildError", "nothing was built")
            return replace(bare, state="failed", reason=f"{failure.kind}: {failure.message}"[:1000])
        own = counted[result.cell.name]
        if isinstance(own, Failure):
            return replace(bare, state="failed", reason=f"{own.kind}: {own.message}"[:1000])
        base = self._base = self._base or own
        manifest = result.known.manifest
        parameters, macs = size_after(manifest)
        paired = pair(base.predictions, own.predictions, own.labels)
        made = replace(
            bare,
            bundle=result.known.digest,
            artifact=manifest.artifacts[0].blob.sha256,
            parameters=parameters,
            macs=macs or 0,
            size_mb=manifest.artifacts[0].blob.size / 1e6,
            top1=sum(p == y for p, y in zip(own.predictions, own.labels, strict=True)) / len(own.labels),
            images=len(own.labels),
            loss=100.0 * (paired.lost - paired.gained) / len(own.labels),
            lost=paired.lost,
            gained=paired.gained,
        )
        missed = misses(made.reached, self.limits)
        return replace(made, state="misses", reason="; ".join(m.text for m in missed)) if missed else made


def survey_model(source: ModelSource, engine: Engine, cache: Cache, progress: Progress) -> Survey:
    """What the search must know of the model beforehand, kept where its weights can be told without loading it. Raises what
    loading it raises."""
    identity = source.fast_digest(cache)
    key = digest_of("tune survey", identity, code_digest(), tool_versions())
    known = None if identity is None else cache.get(key)
    if known is not None and identity is not None:
        meta = known.meta
        known_model, bulk = KnownModel(identity, meta["reasons"]), Bulk(**meta["bulk"])
        return Survey(known_model, meta["depth"], meta["tokens"], meta["seconds_per_step"], bulk)
    (outcome,) = run_all(engine, [Task("model", survey, source)], progress)
    if outcome.failure is not None:
        raise _raised(outcome.failure)
    found: Survey = outcome.value
    if identity is not None:
        found = replace(found, known=replace(found.known, identity=identity))
        meta = {"reasons": dict(found.known.not_applicable), "depth": found.depth, "tokens": found.tokens}
        cache.put(key, {}, {**meta, "seconds_per_step": found.seconds_per_step, "bulk": asdict(found.bulk)})
    return found


def training_seconds(drawn: Drawn, survey: Survey) -> float:
    """About how long the training steps of a recipe take here: what the recipe says, times a step as timed on this model."""
    total = 0.0
    for step in drawn.recipe.steps:
        for config in step.configs:
            if config.trains and config.steps is not None:
                total += config.steps * survey.seconds_per_step
            elif config.trains and config.minutes is not None:
                total += 60.0 * config.minutes
    return total


def _bare(number: int, drawn: Drawn) -> Candidate:
    return Candidate(number, drawn.recipe, drawn.format, drawn.threads, drawn.label, "passed")


def _no_recipe() -> Any:
    from edgevit.recipe import load_recipe

    return load_recipe("fp32")


def _raised(failure: Failure) -> Exception:
    """The error that a worker ended with, as this process raises it."""
    from edgevit import errors

    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.EdgevitError) and kind.__init__ is errors.EdgevitError.__init__:
        return kind(failure.message, hint=failure.hint)
    return BuildError(failure.message, hint=failure.hint)
