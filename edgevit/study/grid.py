"""Building the cells of a study: what cannot apply is told first, what was built before is taken, the rest is built in
processes of its own, and a cell that fails keeps its error while the others go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from device_agents import wire
from edgevit.cache import Cache
from edgevit.engines import Engine, Processes, run_all
from edgevit.errors import BuildError
from edgevit.images import DataSets
from edgevit.profile import Profile
from edgevit.progress import Progress
from edgevit.study.file import Study, StudyModel
from edgevit.study.plan import (
    Cell,
    Known,
    KnownModel,
    cell_key,
    find_known,
    keep_known,
    keep_model,
    kinds_of,
    known_model,
    model_sets,
    plan_cells,
    startable,
    with_data,
    with_models,
)
from edgevit.study.work import Examine, build_cell, examine, make_digits, to_build
from edgevit.workers import Failure, Outcome, Task


@dataclass(frozen=True)
class CellResult:
    """What became of a cell: ``known`` where there is a bundle, else ``failure``, else ``cell.not_applicable``. ``reused``: the
    cache had it. ``pid``: the process that built it, 0 where none did."""

    cell: Cell
    identity: str
    known: Known | None = None
    failure: Failure | None = None
    reused: bool = False
    pid: int = 0


def prepare_examples(study: Study, folder: Path, progress: Progress) -> Study:
    """The study with the weights and images of its examples in place, made below ``folder`` the first time."""
    if not any(m.example for m in study.models):
        return study
    digits = folder / "digits" / "digits"
    weights = folder / "digits" / "digits.safetensors"
    if not (weights.exists() and (digits / "labels.txt").exists()):
        task = Task("digits", make_digits, folder / "digits")
        for outcome in run_all(Processes(1), [task], progress):
            if outcome.failure is not None:
                raise BuildError(f"the digits example: {outcome.failure.message}", hint=outcome.failure.hint)

    def filled(model: StudyModel) -> StudyModel:
        if model.example is None:
            return model
        source = replace(model.source, weights=weights, labels=model.source.labels or digits / "labels.txt")
        calib, evaluation = model.calib or digits / "train.csv", model.eval or digits / "held-out.csv"
        return replace(model, source=source, calib=calib, eval=evaluation)

    return replace(study, models=tuple(filled(m) for m in study.models))


def build_grid(
    study: Study,
    profiles: Sequence[Profile],
    root: Path,
    key: Path,
    engine: Engine,
    cache: Cache,
    progress: Progress,
    on_planned: Callable[[Sequence[Cell]], None] = lambda cells: None,
) -> list[CellResult]:
    """Every cell of ``study`` for ``profiles``, in its order; bundles lie below ``root``, signed with the private key ``key``.

    ``on_planned`` hears of all cells once it is known which can apply, before any is built.

    Raises :class:`DataError` for images that are not there; what goes wrong with one model or one cell is its own result.
    """
    sets = model_sets(study, cache)
    cells = with_data(plan_cells(study, profiles), sets)
    models, unloadable = look_at_models(study, cells, engine, cache, progress)
    cells = with_models(cells, models)
    on_planned(cells)
    results: dict[str, CellResult] = {}
    buildable: list[Cell] = []
    for cell in cells:
        title = cell.model.title
        failure = unloadable.get(title)
        if cell.not_applicable or failure is not None:
            identity = models[title].identity if title in models else ""
            results[cell.name] = CellResult(cell, identity, failure=None if cell.not_applicable else failure)
        else:
            buildable.append(cell)
    results.update(build_cells(buildable, models, sets, root, key, engine, cache, progress))
    return [results[cell.name] for cell in cells]


def build_cells(
    cells: Sequence[Cell],
    models: Mapping[str, KnownModel],
    sets: Mapping[str, DataSets],
    root: Path,
    key: Path,
    engine: Engine,
    cache: Cache,
    progress: Progress,
) -> dict[str, CellResult]:
    """What became of each of ``cells``, all of which apply, by name: taken from the cache, else built by ``engine``. ``models``
    and ``sets`` by the model's title."""
    results: dict[str, CellResult] = {}
    waiting: list[Cell] = []
    for cell in cells:
        identity = models[cell.model.title].identity
        known = find_known(cell_key(cell, identity, sets[cell.model.title]), cache)
        if known is None:
            waiting.append(cell)
        else:
            results[cell.name] = CellResult(cell, identity, known, reused=True)
    _build(waiting, results, models, sets, root, key, engine, cache, progress)
    return results


def look_at_models(
    study: Study, cells: Sequence[Cell], engine: Engine, cache: Cache, progress: Progress
) -> tuple[dict[str, KnownModel], dict[str, Failure]]:
    """What is known of each model by title, from an earlier study or by loading it; and why some cannot be loaded."""
    models: dict[str, KnownModel] = {}
    failures: dict[str, Failure] = {}
    tasks = []
    kinds = {m.title: kinds_of(cells, m.title) for m in study.models}
    by_title = {m.title: m for m in study.models}
    for model in study.models:
        if not kinds[model.title]:
            continue
        known = known_model(model, kinds[model.title], cache)
        if known is not None:
            models[model.title] = known
        else:
            tasks.append(Task(model.title, examine, Examine(model.source, tuple(kinds[model.title]))))
    for outcome in run_all(engine, tasks, progress):
        title = outcome.task.name
        if outcome.failure is not None:
            failures[title] = outcome.failure
        else:
            models[title] = keep_model(by_title[title], outcome.value, kinds[title], cache)
    return models, failures


def _build(
    waiting: list[Cell],
    results: dict[str, CellResult],
    models: Mapping[str, KnownModel],
    sets: Mapping[str, DataSets],
    root: Path,
    key: Path,
    engine: Engine,
    cache: Cache,
    progress: Progress,
) -> None:
    """Build ``waiting`` (emptied) into ``results``."""
    if not waiting:
        return
    total = len(waiting)
    running: dict[str, Cell] = {}
    done: set[str] = set()

    def next_task() -> Task | None:
        index = startable(waiting, running.values(), done)
        if index is None:
            return None
        cell = waiting.pop(index)
        running[cell.name] = cell
        identity = models[cell.model.title].identity
        return Task(cell.name, build_cell, to_build(cell.request, root / cell.folder, key, identity))

    progress.start("study", f"building {total} cells in {engine.jobs} process{'es' if engine.jobs > 1 else ''}", total, "cells")
    for finished, outcome in enumerate(engine.run(next_task, progress), 1):
        cell = running.pop(outcome.task.name)
        result = _ended(cell, outcome, models[cell.model.title].identity)
        results[cell.name] = result
        if result.known is not None:
            done |= cell.shares
            keep_known(cell_key(cell, result.identity, sets[cell.model.title]), result.known, cache)
        progress.advance("study", finished)
    failed = sum(r.failure is not None for r in results.values())
    progress.finish("study", f"{total} cells built" if not failed else f"{total - failed} cells built, {failed} failed")


def _ended(cell: Cell, outcome: Outcome, identity: str) -> CellResult:
    if outcome.failure is not None:
        return CellResult(cell, identity, failure=outcome.failure, pid=outcome.pid)
    manifest = wire.decode(wire.Manifest, outcome.value.manifest, "manifest of a cell")
    return CellResult(cell, identity, Known(outcome.value.digest, manifest), reused=outcome.value.reused, pid=outcome.pid)
