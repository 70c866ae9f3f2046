"""``edgevit study``: a grid of recipes, models and targets."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.bench import Wanted, bench_session
from edgevit.cli.connect import Session, each_target, select_targets, target_profile
from edgevit.cli.console import emit_json, json_option, out, say
from edgevit.cli.model_options import FILE, engine_options
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from edgevit.bundle import Bundle
    from edgevit.profile import Profile
    from edgevit.progress import Progress
    from edgevit.results.store import Store
    from edgevit.results.summary import Summary
    from edgevit.study.file import Study
    from edgevit.study.grid import CellResult
    from edgevit.study.plan import Cell, Known
    from edgevit.study.rows import Row
    from edgevit.variants import Runnable


def _settings(_ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in value:
        name, sign, text = item.partition("=")
        if not sign or not name or not text:
            raise click.BadParameter(f"got {item!r}, expected NAME=VALUE", param=param)
        if name in found:
            raise click.BadParameter(f"{name} is set twice", param=param)
        found[name] = text
    return found


@click.command()
@click.argument("file", metavar="STUDY")
@click.option("--set", "settings", multiple=True, callback=_settings, metavar="K=V", help="A name that the study leaves open.")
@click.option("--target", "targets", multiple=True, metavar="T", help="Measure here instead of on the study's targets.")
@click.option("--plan", type=click.Choice(["quick", "standard"]), help="Instead of the study's plan.")
@engine_options
@click.option("--again", is_flag=True, help="Measure also what the results hold already.")
@click.option("-o", "--output", type=FILE, metavar="DIR", help="Keep the bundles here.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Write the table as markdown, too.")
@click.option("--csv", "csv_file", type=FILE, metavar="FILE", help="Write every figure as CSV, too.")
@click.option("--sign-key", type=FILE, help="SSH private key that signs; default: the one of `edgevit key`.")
@click.option("--wide", is_flag=True, help="Every column.")
@json_option
def study(
    file: str,
    settings: dict[str, str],
    targets: Sequence[str],
    plan: str | None,
    jobs: int | None,
    engine_name: str,
    again: bool,
    output: Path | None,
    markdown: Path | None,
    csv_file: Path | None,
    sign_key: Path | None,
    wide: bool,
    as_json: bool,
) -> int:
    """Build and measure the grid of STUDY (a shipped study's name or a YAML file), and show it as one table.

    Every recipe on every model in every format, on every target. What cannot apply is told before work starts; what was built
    or measured before is taken as it is, so a study that was interrupted goes on where it stood.
    """
    from edgevit import places
    from edgevit.cache import Cache
    from edgevit.cli.build import signing_key
    from edgevit.engines import open_engine
    from edgevit.results.store import open_store
    from edgevit.study.file import load_study
    from edgevit.study.grid import build_grid, prepare_examples

    loaded = load_study(file, settings)
    asked = replace(loaded, targets=tuple(targets) or loaded.targets, plan=plan or loaded.plan)
    verify_writable(output, markdown, csv_file)
    cache, key = Cache(), signing_key(sign_key)
    with open_store() as store, showing_progress() as progress, ExitStack() as held:
        boards = target_boards(asked)
        profiles = all_profiles(asked, boards)
        whole = prepare_examples(asked, places.data_dir(), progress)
        root = output or cache.root / "studies" / whole.digest[:16]
        if output is None:
            held.enter_context(alone(root))
        with open_engine(engine_name, jobs) as engine:
            results = build_grid(whole, profiles, root, key, engine, cache, progress, say_not_applicable)
        measuring = Measuring(whole, results, boards, root, key, store, progress, again, keep=output is not None)
        code = measuring.run()
        rows = measuring.rows()
        if output is None:
            shutil.rmtree(root, ignore_errors=True)
        else:
            for result in results:
                if result.known is not None:
                    measuring.pack(result)
    show(whole, results, measuring, rows, wide=wide, as_json=as_json)
    write_files(whole, rows, markdown, csv_file)
    return code or int(any(r.state == "failed" for r in rows))


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """For as long as the block runs nobody else may work in ``root``, which is thrown away in the end. UsageError where
    somebody does."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UsageError(f"this very study is running already ({root})", hint="wait for it, or end it") from e
        yield


def target_boards(study: Study) -> dict[str, Profile]:
    """The profile of each target the study is measured on, by the target's name."""
    from edgevit.profile import load_profile

    if not study.targets:
        return {}
    return {t.name: load_profile(target_profile(t)) for t in select_targets(study.targets)}


def all_profiles(study: Study, boards: dict[str, Profile]) -> list[Profile]:
    """The profiles every file must be fit for: the targets' and the study's own, each once."""
    from edgevit.profile import load_profile

    found = {p.name: p for p in boards.values()}
    found.update({name: load_profile(name) for name in study.profiles})
    if not found:
        raise UsageError(f"{study.name} names no target and no profile", hint="edgevit study … --target local")
    return list(found.values())


def say_not_applicable(cells: Sequence[Cell]) -> None:
    """Every cell that cannot apply, with its reason, before work starts."""
    for cell in cells:
        if cell.not_applicable:
            say(f"n/a: {cell.name}: {cell.not_applicable}")


class Measuring:
    """One study's way through its targets, and what came of it. ``keep``: bundles stay on the targets. ``taken`` names the
    cells measured now, by target."""

    def __init__(
        self,
        study: Study,
        results: Sequence[CellResult],
        boards: dict[str, Profile],
        root: Path,
        key: Path,
        store: Store,
        progress: Progress,
        again: bool,
        *,
        keep: bool,
    ) -> None:
        from edgevit.plans import PLANS

        self.study, self.results, self.boards, self.root, self.key = study, results, boards, root, key
        self.store, self.progress, self.again, self.keep = store, progress, again, keep
        self.plan = PLANS[study.plan]
        self.taken: dict[str, list[str]] = {}
        self.left_out: dict[tuple[str, str], str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> int:
        """Measure what the store lacks, each target by itself; 3 if one was unreachable or refused, else 0 or 1."""
        wanting = [name for name in self.boards if self.again or self._missing(name)]
        if not wanting:
            return 0
        done, code = each_target(wanting, self._work, sign_key=self.key)
        reached = {name for name, _ in done}
        self.failed = {name: "the target failed or was not reached" for name in wanting if name not in reached}
        if reached and not self.keep:
            # A connection of its own: the one that measured may have been lost and made anew on the way.
            _, later = each_target(sorted(reached), self._discard, sign_key=self.key)
            code = max(code, later)
        return code

    def rows(self) -> list[Row]:
        """Every cell on every target, related to fp32."""
        from edgevit.study.rows import related

        rows: list[Row] = []
        behind: list[Summary | None] = []
        for target in list(self.boards) or [""]:
            found = self._found(target) if target else {}
            for result in self.results:
                one = self._rows_of(result, target, found)
                rows += [row for row, _ in one]
                behind += [summary for _, summary in one]
        return related(rows, behind)

    def pack(self, result: CellResult) -> Bundle:
        """The bundle of a cell that was built, below the study's folder."""
        from edgevit import signing
        from edgevit.build import make_bundle
        from edgevit.progress import Quiet

        place = self.root / result.cell.folder
        version = None if result.known is None else result.known.manifest.version
        made = make_bundle(result.cell.request, place, lambda d: signing.sign(d, self.key), Quiet(), result.identity, version)
        return made.bundle

    def _found(self, target: str) -> dict[str, list[Summary]]:
        from edgevit.study.measured import measured_rows

        bundles = [r.known.digest for r in self.results if r.known is not None]
        return measured_rows(self.store, bundles, target, self.plan, self.study.threads)

    def _missing(self, target: str) -> list[CellResult]:
        """Cells that the target's board can run and that have no VALID measurement there."""
        from edgevit.study.measured import is_measured
        from edgevit.study.plan import format_reason

        found = self._found(target)
        board = [self.boards[target]]
        return [
            r
            for r in self.results
            if r.known is not None
            and not format_reason(r.cell.format, r.cell.recipe, board)
            and not is_measured(found.get(r.known.digest, ()), self.study.threads)
        ]

    def _work(self, session: Session) -> None:
        """Bring home what an interrupted study left there, then one interleaved job a model of what is still missing."""
        from edgevit.bench import bring_home

        name = session.target.name
        for old in bring_home(session.agent, self.store, self.progress, wait=True):
            say(f"{name}: brought home {old.run.job.run_id}, measured {old.run.ended_at}")
        missing = list(self.results) if self.again else self._missing(name)
        for title in dict.fromkeys(r.cell.model.title for r in missing):
            self._measure_model(session, title, [r for r in missing if r.cell.model.title == title])

    def _discard(self, session: Session) -> None:
        session.agent.uninstall([r.known.digest for r in self.results if r.known is not None])

    def _measure_model(self, session: Session, title: str, missing: Sequence[CellResult]) -> None:
        from edgevit.variants import list_variants

        name = session.target.name
        facts = session.agent.probe()
        profile = session.profile(facts)

        def runnable(known: Known) -> Runnable:
            return list_variants(known.manifest, known.digest, facts, profile, threads=self.study.threads)

        chosen = []
        for result in missing:
            if result.known is None:
                continue
            found = runnable(result.known)
            if found.variants:
                chosen.append(result)
            else:
                self.left_out[name, result.known.digest] = "; ".join(left.reason for left in found.left_out)
        if not chosen:
            return
        references = (r for r in self._references(title) if r.known is not None and runnable(r.known).variants)
        reference = next(references, None)
        if reference is not None and reference not in chosen:
            chosen.insert(0, reference)  # × fp32 is of one run: what drifts from day to day cancels
        batch = self.store.new_batch(f"study {self.study.name} {self.study.digest[:12]}: {title} on {name}")
        bundles = [self.pack(r) for r in chosen]
        bench_session(session, Wanted(bundles, self.plan, self.study.threads), batch, self.store, self.progress, self.key)
        self.taken.setdefault(name, []).extend(r.cell.name for r in chosen)

    def _references(self, title: str) -> list[CellResult]:
        """The fp32 cells of a model, ONNX first."""
        plain = [r for r in self.results if r.cell.model.title == title and r.cell.scheme == "fp32"]
        return sorted(plain, key=lambda r: (r.cell.recipe.name != "fp32", r.cell.format != "onnx"))

    def _rows_of(self, result: CellResult, target: str, found: dict[str, list[Summary]]) -> list[tuple[Row, Summary | None]]:
        from edgevit.study.plan import format_reason
        from edgevit.study.rows import Row, built_row, measured_row

        cell = result.cell
        bare = Row(cell.model.title, cell.recipe.name, cell.format, cell.scheme, target, "n/a")
        if result.failure is not None:
            text = f"{result.failure.kind}: {result.failure.message}"
            return [(replace(bare, state="failed", reason=text, hint=result.failure.hint), None)]
        reason = cell.not_applicable
        if not reason and target:
            reason = format_reason(cell.format, cell.recipe, [self.boards[target]])
        if reason or result.known is None:
            return [(replace(bare, reason=reason), None)]
        digest = result.known.digest
        why = self.left_out.get((target, digest)) or self.failed.get(target) or "it was not measured"
        row = built_row(result.known.manifest, digest, cell.model.title, target, why if target else "")
        measured = sorted(found.get(digest, ()), key=lambda s: s.threads)
        return [(measured_row(row, s), s) for s in measured] or [(row, None)]


def show(
    study: Study, results: Sequence[CellResult], measuring: Measuring, rows: Sequence[Row], *, wide: bool, as_json: bool
) -> None:
    """The table, or one JSON document."""
    from edgevit.report.study_view import json_rows, render_study

    built = [r for r in results if r.known is not None and not r.reused]
    if as_json:
        payload: dict[str, Any] = {
            "study": study.name,
            "digest": study.digest,
            "plan": study.plan,
            "threads": list(study.threads),
            "built": [r.cell.name for r in built],
            "reused": [r.cell.name for r in results if r.reused],
            "not_applicable": [r.cell.name for r in results if r.cell.not_applicable],
            "failed": [r.cell.name for r in results if r.failure is not None],
            "processes": sorted({r.pid for r in results if r.pid}),
            "measured": measuring.taken,
            "rows": json_rows(rows),
        }
        emit_json("study", payload)
        return
    out(wide).print(render_study(rows, wide=wide))
    count = sum(len(names) for names in measuring.taken.values())
    say(f"{study.name}: {len(built)} cells built, {sum(r.reused for r in results)} taken from the cache, {count} measured")


def verify_writable(folder: Path | None, *files: Path | None) -> None:
    """Raises :class:`UsageError` for what could not be written in the end, before any work starts."""
    from edgevit.outputs import verify_writable_file, verify_writable_folder

    if folder is not None:
        verify_writable_folder(folder)
    for path in files:
        if path is not None:
            verify_writable_file(path)


def write_files(study: Study, rows: Sequence[Row], markdown: Path | None, csv_file: Path | None) -> None:
    """The table as documents want it. Raises :class:`UsageError` where one cannot be written."""
    from edgevit.outputs import write_whole
    from edgevit.report import study_view

    if markdown is not None:
        write_whole(markdown, study_view.markdown(rows, f"{study.name}: {study.summary}"))
    if csv_file is not None:
        write_whole(csv_file, study_view.csv_text(rows))
    for path in (markdown, csv_file):
        if path is not None:
            say(f"wrote {path}")
