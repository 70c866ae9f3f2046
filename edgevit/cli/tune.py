"""``edgevit tune``: search recipes with the boards in the loop."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.connect import select_targets, target_profile
from edgevit.cli.console import emit_json, json_option, out, say
from edgevit.cli.model_options import FILE, data_options, engine_options, model_options, model_source
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.profile import Profile
    from edgevit.study.file import StudyModel
    from edgevit.tune.answer import Answer
    from edgevit.tune.candidate import Candidate
    from edgevit.tune.host import Asked, Host
    from edgevit.tune.search import Search
    from edgevit.tune.space import Space

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _budget(_ctx: click.Context, param: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", value.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"got {value!r}, expected a time such as 90s, 30m or 2h", param=param)
    return float(match[1]) * _UNITS[match[2]]


@click.command()
@model_options
@data_options
@click.option("--target", "targets", multiple=True, required=True, metavar="T", help="Where to measure; several allowed.")
@click.option("--max-loss", type=float, required=True, metavar="POINTS", help="Top-1 that may be lost against fp32.")
@click.option("--max-p90-ms", type=float, metavar="MS", help="Of an inference, on every target by itself.")
@click.option("--max-memory-mb", type=float, metavar="MB", help="Peak memory of the process.")
@click.option("--max-size-mb", type=float, metavar="MB", help="Size of the file.")
@click.option("--max-energy-mj", type=float, metavar="MJ", help="Energy of an inference; needs a sensor of power.")
@click.option(
    "--budget",
    "seconds",
    default="30m",
    show_default=True,
    callback=_budget,
    metavar="TIME",
    help="90s, 30m, 2h: in all, over every run of this search.",
)
@click.option("--trials", type=click.IntRange(1), metavar="N", help="No more than N candidates.")
@click.option("--threads", type=click.IntRange(1), multiple=True, help="Threads to search; default: what the profiles say.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search.")
@click.option(
    "--confirm",
    type=click.Choice(["quick", "standard"]),
    default="standard",
    show_default=True,
    help="How the best are measured in the end.",
)
@click.option("--anyway", is_flag=True, help="Let INVALID figures count, too.")
@engine_options
@click.option("-o", "--output", type=FILE, metavar="DIR", help="The winner of each target: its bundle, and its recipe as YAML.")
@json_option
def tune(
    targets: Sequence[str],
    max_loss: float,
    max_p90_ms: float | None,
    max_memory_mb: float | None,
    max_size_mb: float | None,
    max_energy_mj: float | None,
    seconds: float,
    trials: int | None,
    threads: Sequence[int],
    seed: int,
    confirm: str,
    anyway: bool,
    jobs: int | None,
    engine_name: str,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Search for the recipe that runs MODEL fastest on each target within the limits, by building and measuring.

    Shipped recipes first, then what Optuna draws. What fails here, loses too much or cannot be fast enough never goes to a
    board. The same command again goes on where it stood; a search that is done measures nothing. Exit 1: nothing meets the
    limits on some target.
    """
    from edgevit import places
    from edgevit.cache import Cache
    from edgevit.cli.build import signing_key
    from edgevit.cli.tune_road import Road, visit
    from edgevit.engines import open_engine
    from edgevit.plans import PLANS
    from edgevit.results.store import open_store
    from edgevit.tune.host import Host, survey_model
    from edgevit.tune.limits import Limits, verify_limits, verify_measurable
    from edgevit.tune.search import Effort, Search
    from edgevit.tune.size import least_mb
    from edgevit.tune.trials import Trials

    limits = Limits(max_loss, max_p90_ms, max_memory_mb, max_size_mb, max_energy_mj)
    verify_limits(limits)
    if options["eval_data"] is None:
        raise UsageError("loss is counted on labelled images, and none were given", hint="edgevit tune … --eval DATA")
    if output is not None:
        from edgevit.outputs import verify_writable_folder

        verify_writable_folder(output)
    names = [t.name for t in select_targets(targets)]
    verify_keepable(output, names)
    cache = Cache()
    model, given = what_is_given(options, cache)
    key = signing_key(options["sign_key"])
    with open_store() as store, showing_progress() as progress:
        profiles = {t.name: profile_of(t) for t in select_targets(names)}
        facts, away = visit(names, store, progress, key)
        if not facts:
            return away
        verify_measurable(limits, facts)
        verify_threads(threads, facts)
        rest = [*map(str, vars(limits).items()), *threads, seed]
        with ExitStack() as opened:
            engine = opened.enter_context(open_engine(engine_name, jobs))
            survey = survey_model(model.source, engine, cache, progress)
            asked, digest = what_is_asked(model, [survey.known.identity, *given], options, profiles, key, rest)
            root = cache.root / "tune" / digest[:16]
            kept = opened.enter_context(Trials(places.data_dir() / "tune" / digest[:16], seed))
            progress.start("tune", f"searching for {seconds / 60:g} minutes", round(seconds), "s")
            host = Host(asked, survey, engine, cache, root, progress, limits)
            road = Road(store, progress, key, facts, host, kept)
            space = the_space(kept, host, facts, profiles, options["model_formats"], threads)
            search = Search(
                space, limits, Effort(seconds, trials), tuple(names), kept, host, road, progress, PLANS[confirm], anyway,
                least_mb=lambda drawn: least_mb(drawn, survey.bulk),
            )  # fmt: skip
            search.dead = {name: "it was not reached" for name in names if name not in facts}
            search.on_front = say_front
            search.go()
            progress.finish("tune", f"{len(search.candidates)} candidates; {search.ended}")
            code = finish(search, names, output, as_json)
            road.tidy(search.dead)
        shutil.rmtree(root, ignore_errors=True)
    return max(away, road.code) or code


def verify_keepable(output: Path | None, names: Sequence[str]) -> None:
    """Raises :class:`UsageError` where something else than a bundle is where a winner's is to be kept."""
    from edgevit.bundle import MANIFEST

    for place in () if output is None else [output / name / "bundle" for name in names]:
        if place.exists() and not (place / MANIFEST).is_file():
            raise UsageError(
                f"{place} is there and is no bundle: the winner's is kept in that place", hint="give another -o DIR"
            )


def profile_of(target: Any) -> Profile:
    from edgevit.profile import load_profile

    return load_profile(target_profile(target))


def verify_threads(threads: Sequence[int], facts: Mapping[str, Facts]) -> None:
    """Raises :class:`UsageError` for more threads than a target has cores."""
    for name, one in facts.items():
        if threads and max(threads) > one.cpu_count:
            raise UsageError(
                f"--threads {max(threads)}: {name} has {one.cpu_count} cores", hint=f"give --threads 1 to {one.cpu_count}"
            )


def what_is_given(options: dict[str, Any], cache: Any) -> tuple[StudyModel, list[Any]]:
    """The model with its data, and what identifies the data: read before anything is made or any target is asked."""
    from edgevit.data import open_data
    from edgevit.study.file import StudyModel

    source = model_source(options)
    model = StudyModel(source.name, source, options["calib_data"], options["eval_data"], tuple(options["train_data"]), None)
    data = (model.eval, model.calib, *model.train)
    return model, [vars(source), [None if path is None else open_data(path, cache).digest for path in data]]


def what_is_asked(
    model: StudyModel,
    given: list[Any],
    options: dict[str, Any],
    profiles: Mapping[str, Profile],
    key: Path,
    rest: Sequence[Any],
) -> tuple[Asked, str]:
    """What is built from, and the digest by which this very search is known again: over all that changes what it builds."""
    from edgevit.build import code_digest
    from edgevit.cache import digest_of, tool_versions
    from edgevit.tune.host import Asked

    boards = tuple({p.name: p for p in profiles.values()}.values())
    named = [[name, p.model_dump(mode="json")] for name, p in profiles.items()]
    made_by = [code_digest(), tool_versions()]
    digest = digest_of("tune", *given, named, options["model_formats"], options["batch"], list(rest), made_by)
    return Asked(model, boards, options["batch"], key), digest


def the_space(
    kept: Any,
    host: Host,
    facts: Mapping[str, Facts],
    profiles: Mapping[str, Profile],
    formats: Sequence[str],
    threads: Sequence[int],
) -> Space:
    """What is searched, decided once for a search: a target that is away later changes nothing of it."""
    from edgevit.tune.space import Space

    known = kept.get("space")
    if known is not None:
        lists = {name: tuple(known[name]) for name in ("precisions", "steps", "threads")}
        return Space(**lists, depth=known["depth"], tokens=known["tokens"])
    space = make_space(host, facts, profiles, formats, threads)
    kept.set("space", vars(space))
    return space


def make_space(
    host: Host,
    facts: Mapping[str, Facts],
    profiles: Mapping[str, Profile],
    formats: Sequence[str],
    threads: Sequence[int],
) -> Space:
    """The precisions that some target's proven runtimes run, a float one that all do first; the steps that apply, and the
    thread counts all targets have."""
    from device_agents.wire import RUNTIMES_OF_FORMAT
    from edgevit.artifacts import fitting_profiles
    from edgevit.export import PAIRS
    from edgevit.tune.space import STEPS, Space

    def runs_on(name: str, format_: str, scheme: str) -> bool:
        proven = any(r.runtime in RUNTIMES_OF_FORMAT[format_] for r in facts[name].runtimes)
        return proven and bool(fitting_profiles(format_, scheme, [profiles[name]]))

    lacking = {"int8-static", "int4-weights", "mixed"} if host.sets.calibration is None else set()
    reasons = host.survey.known.not_applicable
    quantizes = ("fp32", "fp16") if "quantize" in reasons else None
    precisions = tuple(
        f"{f} {s}"
        for f in formats
        for s in PAIRS[f]
        if any(runs_on(name, f, s) for name in facts) and s not in lacking and (quantizes is None or s in quantizes)
    )
    # All else is held against one float file, in each job of each target.
    everywhere = [f"{f} fp32" for f in formats if all(runs_on(name, f, "fp32") for name in facts)]
    if not everywhere:
        alone = len(facts) > 1 and any(p.endswith(" fp32") for p in precisions)
        raise UsageError(
            f"no float {' or '.join(formats)} file runs on {' and '.join(facts)} that others could be held against",
            hint="edgevit tune … --target T, a search for each of them" if alone else "edgevit target probe TARGET",
        )
    precisions = tuple(sorted(precisions, key=lambda p: p != everywhere[0]))
    calibrated = () if host.sets.calibration is None else STEPS
    steps = tuple(s for s in STEPS if s not in reasons and (s == "merge_tokens" or s in calibrated))
    common = set.intersection(*({t for t in profiles[n].threads.value if t <= one.cpu_count} for n, one in facts.items()))
    counts = tuple(sorted(set(threads) or common or {1}))
    return Space(precisions, steps, counts, host.survey.depth, host.survey.tokens)


def say_front(target: str, candidate: Candidate, figures: Any) -> None:
    """A new member of the front, as it is found."""
    from edgevit.report.tune_view import one_line
    from edgevit.tune.answer import Rated

    say(f"{target}: on the front: {one_line(Rated(candidate, figures, False, ()))}")


def finish(search: Search, names: Sequence[str], output: Path | None, as_json: bool) -> int:
    """Show what was found and keep the winners; 1 where a target has none."""
    from edgevit.report.tune_view import render_answers
    from edgevit.tune.answer import answer, to_json

    answers = [answer(search, name) for name in names]
    kept = {} if output is None else {a.target: keep_winner(search, a, output) for a in answers if a.winner is not None}
    if as_json:
        emit_json("tune", {**to_json(search, answers), "kept": {name: str(place) for name, place in kept.items()}})
    else:
        out().print(render_answers(answers, search.limits, search.ended))
        for name, place in kept.items():
            say(f"{name}: {place}/bundle and {place}/recipe.yaml; next: edgevit deploy {place}/bundle {name}")
    return int(any(a.winner is None for a in answers if not a.dead))


def keep_winner(search: Search, answer: Answer, output: Path) -> Path:
    """The winner's bundle and its recipe below ``output``; the folder of its target."""
    from edgevit.outputs import write_whole
    from edgevit.tune.space import recipe_yaml

    if answer.winner is None:
        raise TypeError("there is no winner to keep")
    place = output / answer.target
    place.mkdir(parents=True, exist_ok=True)
    verify_keepable(output, [answer.target])
    with tempfile.TemporaryDirectory(dir=place, prefix=".bundle-") as scratch:
        search.host.pack(answer.winner.candidate, Path(scratch) / "bundle")
        if (place / "bundle").exists():
            (place / "bundle").rename(Path(scratch) / "before")
        (Path(scratch) / "bundle").rename(place / "bundle")
    write_whole(place / "recipe.yaml", recipe_yaml(answer.winner.candidate.recipe))
    return place
