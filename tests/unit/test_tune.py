"""Searching without a device or torch: limits, the space, the latency table, and the way of a search on simulated boards."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgevit.cli import run_cli
from edgevit.errors import MissingExtra, StoreError, UsageError
from edgevit.plans import PLANS
from edgevit.progress import Quiet
from edgevit.recipe import list_recipes, load_recipe
from edgevit.report.tune_view import render_answers
from edgevit.tune.answer import answer, to_json
from edgevit.tune.boundary import Outcome, draw_at_boundary
from edgevit.tune.candidate import Candidate
from edgevit.tune.latency import FEWEST_HELD_OUT, Timed, learn
from edgevit.tune.limits import Limits, Reached, misses, not_known, shares, verify_limits, verify_measurable
from edgevit.tune.search import AT_ONCE, Effort, Measured, Search
from edgevit.tune.size import LEAST_BITS, Bulk, least_mb
from edgevit.tune.space import STEPS, STRENGTHS, Draw, Drawn, Space, draw, recipe_of, recipe_yaml, seeds, smallest
from edgevit.tune.trials import Trials
from tests.support import runs

SCHEMES = ("fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed")
WHOLE = Space(tuple(f"{f} {s}" for f in ("onnx", "tflite") for s in SCHEMES), STEPS, (1, 2, 4), depth=12, tokens=196)
SMALL = Space(("onnx fp32", "onnx int8-dynamic"), ("prune", "merge_tokens"), (1,), depth=12, tokens=196)


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------


def test_what_misses_a_limit_says_by_how_much_and_what_is_unknown_misses_nothing() -> None:
    limits = Limits(0.5, p90_ms=20.0, size_mb=4.0)
    found = misses(Reached(loss=1.0, p90_ms=25.0, size_mb=4.0), limits)
    assert [m.text for m in found] == ["loss 1.00 points, at most 0.5", "p90 25.00 ms, at most 20"]
    assert [m.share for m in found] == [1.0, 0.25]
    assert not misses(Reached(), limits) and not_known(Reached(loss=0.0), limits) == ("p90_ms", "size_mb")
    assert shares(Reached(loss=0.0, size_mb=2.0), limits) == {"loss": -1.0, "size_mb": -0.5}
    assert misses(Reached(loss=0.15), Limits(0.0))[0].share == pytest.approx(0.3), "a share of no loss at all tells nothing"


@pytest.mark.parametrize(
    "limits",
    [Limits(-0.1), Limits(float("nan")), Limits(1, p90_ms=0), Limits(1, size_mb=-4), Limits(1, memory_mb=float("inf"))],
)
def test_limits_that_nothing_can_hold_are_wrong_use(limits: Limits) -> None:
    with pytest.raises(UsageError, match="expected"):
        verify_limits(limits)


def test_energy_cannot_be_limited_where_nothing_measures_it() -> None:
    with pytest.raises(UsageError, match="pi4: energy cannot be held"):
        verify_measurable(Limits(1, energy_mj=5), {"pi4": runs.facts()})
    verify_measurable(Limits(1, energy_mj=5), {"pi5": runs.facts(sensors=("power:board",))})


@pytest.mark.parametrize(
    "words",
    [
        ["--eval", "x", "--max-loss", "-1"],
        ["--eval", "x", "--max-loss", "1", "--max-size-mb", "0"],
        ["--max-loss", "1"],
        ["--eval", "x", "--max-loss", "1", "--budget", "soon"],
        ["--eval", "x"],
    ],
)
def test_what_cannot_be_searched_for_is_wrong_use_before_any_work(words: list[str], home: Path) -> None:
    assert run_cli(["tune", "tests.support.models:tiny_vit", "--random-weights", "--target", "local", *words]) == 2
    assert not (home / "cache").exists(), "work was done"


def test_a_winner_takes_no_place_but_a_bundles_and_only_once_it_is_whole(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    from edgevit.cli.tune import keep_winner
    from edgevit.errors import BuildError

    place = tmp_path / "won" / "local" / "bundle"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    words = ["--random-weights", "--target", "local", "--eval", "x", "--max-loss", "1", "-o", str(tmp_path / "won")]
    assert run_cli(["tune", "tests.support.models:tiny_vit", *words]) == 2
    assert "is no bundle" in capsys.readouterr().err and (place / "notes.txt").read_text() == "mine"

    def pack(candidate: Any, to: Path) -> None:
        to.mkdir()
        (to / "manifest.json").write_text(candidate.label)
        if candidate.label == "cut off":
            raise BuildError("another bundle than was counted")

    def winner(label: str) -> tuple[Any, Any]:
        candidate = SimpleNamespace(label=label, recipe=load_recipe("fp32"))
        won = SimpleNamespace(target="local", winner=SimpleNamespace(candidate=candidate))
        return SimpleNamespace(host=SimpleNamespace(pack=pack)), won

    (place / "notes.txt").unlink()
    place.rmdir()
    for label in ("first", "second"):
        assert keep_winner(*winner(label), tmp_path / "won") == place.parent
        assert (place / "manifest.json").read_text() == label
    with pytest.raises(BuildError):
        keep_winner(*winner("cut off"), tmp_path / "won")
    assert (place / "manifest.json").read_text() == "second", "the winner before is lost"
    assert sorted(p.name for p in place.parent.iterdir()) == ["bundle", "recipe.yaml"]


# --------------------------------------------------------------------------------------------------------------------
# The space
# --------------------------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_of_one_scheme_is_a_seed_and_does_the_same() -> None:
    found = [recipe_of(one, WHOLE) for one in seeds(WHOLE)]
    assert (found[0].label, found[0].format, found[0].threads) == ("fp32", "onnx", 4), (
        "fp32 is what the others are held against"
    )
    digests = {d.recipe.digest for d in found}
    absent = {name for name in list_recipes() if load_recipe(name).digest not in digests}
    assert absent <= {"student", "variants", "prune-channels"}, "another model, several recipes, no plain Vision Transformer's"
    assert len({d.key for d in found}) == len(found)
    trains = [d.recipe.trains for d in found]
    assert trains == sorted(trains), "what trains comes last"


def test_the_baseline_is_a_float_file_that_every_target_runs() -> None:
    from types import SimpleNamespace

    from edgevit.cli.tune import make_space
    from edgevit.profile import load_profile

    host: Any = SimpleNamespace(
        sets=SimpleNamespace(calibration=None),
        survey=SimpleNamespace(known=SimpleNamespace(not_applicable={}), depth=12, tokens=196),
    )
    onnx, tflite = runs.facts().runtimes
    profiles = dict.fromkeys(("both", "small", "old"), load_profile("raspberry-pi-4b"))

    def space(**targets: Any) -> Space:
        return make_space(host, {n: runs.facts(n, runtimes=r) for n, r in targets.items()}, profiles, ("onnx", "tflite"), ())

    assert recipe_of(seeds(space(both=(onnx, tflite)))[0], WHOLE).format == "onnx"
    mixed = space(both=(onnx, tflite), small=(tflite,))
    assert recipe_of(seeds(mixed)[0], mixed).format == "tflite", "the small one could be told nothing"
    assert "onnx int8-dynamic" in mixed.precisions, "what only one of them runs is searched, too"
    with pytest.raises(UsageError, match="runs on old and small"):
        space(old=(onnx,), small=(tflite,))


class Dice:
    """A trial that draws at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.rng.choice(list(choices))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return low + (step or 0.0) * self.rng.randint(0, round((high - low) / (step or 1.0)))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.rng.randint(low, high)


@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(4, 1024))
def test_every_draw_is_a_recipe_that_its_file_says_all_of(seed: int, depth: int, tokens: int) -> None:
    space = replace(WHOLE, depth=depth, tokens=tokens)
    one = recipe_of(draw(Dice(seed), space), space)
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(recipe_yaml(one.recipe))
        file.flush()
        back = load_recipe(file.name)
    assert back == one.recipe and back.digest == one.recipe.digest and back.name == one.recipe.name
    left = tokens
    for config in (s.config for s in one.recipe.steps if s.kind == "merge_tokens"):
        for block, merged in sorted((config.merge or {}).items()):
            assert 0 <= block < depth and merged <= left // 2
            left -= merged


# --------------------------------------------------------------------------------------------------------------------
# Where a limit is just held
# --------------------------------------------------------------------------------------------------------------------

PLAIN: Draw = {"precision": "onnx int8-dynamic", "prune": False, "merge": "none", "first": "float", "rows": "default"}


def merged(ratio: float, **more: Any) -> Draw:
    return {**PLAIN, "merge": "share", "merge_ratio": ratio, "recovery": 0, **more}


HOLDS, FASTER = Outcome(-0.8, -1.0), Outcome(-1.1, 1.0)


@pytest.mark.parametrize(
    ("known", "ratio", "why"),
    [
        ([(PLAIN, HOLDS), (merged(0.33), FASTER)], 0.17, "a step that is left out is one of strength 0"),
        ([(PLAIN, HOLDS), (merged(0.17), Outcome(-0.9, -1.0)), (merged(0.33), FASTER)], 0.25, "neighbours count, not the ends"),
        (
            [(PLAIN, Outcome(-0.8, -0.1)), (merged(0.33), Outcome(-1.1, 9.0))],
            0.08,
            "what steps by images is no smooth function",
        ),
        ([(PLAIN, HOLDS), (merged(0.2), Outcome(-1.0, -0.5))], 0.4, "beyond the last, by the secant"),
        ([(merged(0.2), Outcome(-0.9, -0.6)), (merged(0.4), Outcome(-1.2, -0.4))], 0.6, "no farther than the space goes"),
        ([(merged(0.1), HOLDS), (merged(0.2), Outcome(-1.0, -1.5))], 0.3, "nor than twice the way, where nothing is lost"),
    ],
)
def test_the_next_draw_lies_where_a_limit_is_just_held(known: list[Any], ratio: float, why: str) -> None:
    assert draw_at_boundary(known) == merged(ratio), why


def test_no_draw_is_made_that_is_not_worth_a_build() -> None:
    assert draw_at_boundary([]) is None and draw_at_boundary([(merged(0.33), FASTER)]) is None, "nothing holds the limits"
    known: list[Any] = [(PLAIN, HOLDS), (merged(0.16), None), (merged(0.33), FASTER)]
    assert draw_at_boundary(known) is None, "what is drawn already is drawn again"
    assert draw_at_boundary([(PLAIN, HOLDS), (merged(0.33), Outcome(-0.8, 1.0))]) is None, "it would not be faster"
    other = {**PLAIN, "precision": "tflite int8-dynamic"}
    known = [(PLAIN, HOLDS), (merged(0.33), FASTER), (other, Outcome(-1.2, -1.0))]
    assert draw_at_boundary(known) is None, "the best is faster already"
    assert draw_at_boundary([(PLAIN, HOLDS), (merged(0.33, recovery=100), FASTER)]) is None, "training is no part of the line"
    assert draw_at_boundary([(other, HOLDS), (merged(0.33), FASTER)]) is None, "they differ in more than one strength"
    assert draw_at_boundary([(merged(0.32), HOLDS), (merged(0.33), FASTER)]) is None, "no hundredth is left"
    assert draw_at_boundary([(merged(0.5), HOLDS), (merged(0.6), Outcome(-0.9, -0.9))]) is None, "the space ends there"


@given(
    st.lists(st.tuples(st.integers(0, 2**32), st.floats(-2, 1), st.floats(-2, 2) | st.none()), max_size=40), st.integers(1, 8)
)
def test_a_draw_at_the_boundary_is_a_new_one_of_the_space(found: list[tuple[int, float, float | None]], few: int) -> None:
    """Of a small space, so that draws share lines."""
    known: list[Any] = []
    for seed, value, beyond in found:
        drawn = draw(Dice(seed), SMALL)
        for name in STRENGTHS.keys() & drawn.keys():
            low, high = STRENGTHS[name]
            drawn[name] = round(low + (high - low) * (seed % few) / few, 2)
        known.append((drawn, None if beyond is None else Outcome(value, beyond)))
    one = draw_at_boundary(known)
    if one is not None:
        assert recipe_of(one, SMALL).recipe.steps
        changed = [(d, k) for d, _ in known if d.keys() == one.keys() for k in one if d[k] != one[k]]
        assert all(d != one for d, _ in known) and any(k in STRENGTHS for _, k in changed)
        assert all(STRENGTHS[k][0] <= float(one[k]) <= STRENGTHS[k][1] for k in STRENGTHS.keys() & one.keys())


# --------------------------------------------------------------------------------------------------------------------
# The latency table
# --------------------------------------------------------------------------------------------------------------------

KIND = ("onnx", "int8-dynamic", 1, False)


def test_a_table_learns_a_line_and_says_how_wrong_it_is() -> None:
    table = learn([Timed(KIND, macs, 2.0 + macs / 1e8) for macs in (4e8, 6e8, 9e8, 12e8)])
    assert table.predict(KIND, 10e8) == pytest.approx(12.0) and table.held_out == 4 and table.error == pytest.approx(0.0)
    assert table.optimistic(KIND, 10e8) == pytest.approx(10.8), "nothing is trusted closer than a tenth"
    assert table.predict(("onnx", "fp32", 1, False), 10e8) is None
    one = learn([Timed(KIND, 1e9, 10.0)])
    assert one.predict(KIND, 5e8) == pytest.approx(5.0) and one.error is None and one.optimistic(KIND, 5e8) is None


@given(st.lists(st.tuples(st.floats(1e6, 1e10), st.floats(0.1, 1e3)), min_size=1, max_size=12), st.floats(1e6, 1e10))
def test_no_prediction_is_negative_and_none_is_made_closer_than_its_error(
    points: list[tuple[float, float]], macs: float
) -> None:
    table = learn([Timed(KIND, x, ms) for x, ms in points])
    predicted = table.predict(KIND, macs)
    assert predicted is not None and predicted >= 0
    least = table.optimistic(KIND, macs)
    assert (least is None) == (table.held_out < FEWEST_HELD_OUT)
    assert least is None or 0 <= least <= predicted * 0.9 + 1e-9


# --------------------------------------------------------------------------------------------------------------------
# A search on simulated boards
# --------------------------------------------------------------------------------------------------------------------


class Bench:
    """Host and boards in one, by formulas: MACs fall with pruning and merging, loss rises; int8 runs at twice the speed."""

    def __init__(self, limits: Limits, dies_after: int | None = None, invalid: bool = False, killed_after: int = 99,
                 empty: str = "") -> None:  # fmt: skip
        self.limits, self.dies_after, self.invalid, self.killed_after = limits, dies_after, invalid, killed_after
        self.empty = empty
        self.training_s: list[float] = []
        self.built: list[str] = []
        self.measured: list[tuple[str, str, str]] = []
        self.jobs = 0

    # What edgevit.tune.host.Host has.

    def baseline(self, number: int, drawn: Drawn) -> Candidate:
        return replace(self.made(number, drawn), state="passed", reason="")

    def evaluate(self, drawn: Sequence[tuple[int, Drawn]], training_s: float) -> list[Candidate]:
        self.training_s.append(training_s)
        return [self.made(number, one) for number, one in drawn]

    def made(self, number: int, drawn: Drawn) -> Candidate:
        self.built.append(drawn.key)
        cut = {s.kind: getattr(s.config, "ratio", None) or 0.2 for s in drawn.recipe.steps[:-1]}
        if cut.get("prune", 0) > 0.38:
            return Candidate(number, drawn.recipe, drawn.format, drawn.threads, drawn.label, "failed", "it would not export")
        left = (1 - cut.get("prune", 0)) * (1 - cut.get("merge_tokens", 0))
        loss = 12 * cut.get("prune", 0) ** 2 + 3 * cut.get("merge_tokens", 0) ** 2 + 0.1 * (drawn.scheme != "fp32")
        size = 20.0 * (1 - cut.get("prune", 0)) / (4 if drawn.scheme != "fp32" else 1)
        c = Candidate(
            number, drawn.recipe, drawn.format, drawn.threads, drawn.label, "passed", bundle=runs.sha(drawn.recipe.name),
            artifact=runs.sha(drawn.label), macs=round(1e9 * left), size_mb=size, loss=loss, images=1000, top1=0.8,
        )  # fmt: skip
        missed = misses(c.reached, self.limits)
        return replace(c, state="misses", reason=missed[0].text) if missed else c

    # What edgevit.tune.search.Boards has.

    def recall(self, target: str, bundles: Sequence[str]) -> Sequence[Any]:
        return []

    def measure(self, wanted: Mapping[str, Sequence[Candidate]], plan: Any) -> Measured:
        self.jobs += 1
        if self.jobs > self.killed_after:
            raise KeyboardInterrupt
        came: dict[str, list[Any]] = {}
        dead = {}
        for target, group in wanted.items():
            if target == "weak" and self.dies_after is not None and self.jobs > self.dies_after:
                dead[target] = "it was lost on the way"
                continue
            measurements = []
            for c in group:
                self.measured.append((target, plan.name, c.key))
                ms = (1.0 + 20 * c.macs / 1e9) / (2 if c.scheme != "fp32" else 1) * (3 if target == "weak" else 1)
                foreign = {"foreign_cpu": 6.0} if self.invalid else {}
                rng = random.Random(c.key)
                one = runs.measurement(c.label[:20], p50_ms=ms, samples=80, processes=2, scheme=c.scheme, accuracy=None)
                series = tuple(runs.series(p, ms, 80, rng, **foreign) for p in range(2))
                variant = dataclasses.replace(
                    one.variant, bundle=c.bundle, artifact=f"{c.format}-{c.scheme}", threads=c.threads
                )
                measurements.append(dataclasses.replace(one, variant=variant, series=series))
            made = runs.run(target, f"b{id(self)}-{self.jobs}", measurements=tuple(measurements))
            if target == self.empty:
                made = dataclasses.replace(made, status="interrupted", reason="the power went", measurements=())
            came[target] = [dataclasses.replace(made, job=dataclasses.replace(made.job, plan=plan))]
        return Measured(came, dead, {})


LIMITS = Limits(0.5)


def search(folder: Path, bench: Bench, trials: int = 24, targets: tuple[str, ...] = ("strong",), **more: Any) -> Search:
    kept = Trials(folder, seed=1)
    effort = Effort(more.pop("seconds", 600.0), trials)
    return Search(SMALL, bench.limits, effort, targets, kept, bench, bench, Quiet(), PLANS["quick"], **more)  # type: ignore[arg-type]


def test_a_search_finds_what_is_fastest_within_the_limits_and_confirms_it(tmp_path: Path) -> None:
    bench = Bench(LIMITS)
    one = search(tmp_path, bench)
    one.go()
    won = one.winner("strong")
    assert won is not None
    c, figures = won
    assert c.scheme == "int8-dynamic" and c.loss <= 0.5 and figures.ratio is not None and figures.ratio < 0.45
    assert ("strong", "quick", c.key) in bench.measured, "it was not confirmed"
    fit = [o for o in one.candidates.values() if o.state == "passed"]
    assert c.macs <= min(o.macs for o in fit if o.scheme == "int8-dynamic") * 1.02, "a faster one that fits was passed over"
    assert not {c.key for c in one.candidates.values() if c.state == "misses"} & {key for _, _, key in bench.measured}
    front = one.front("strong")
    assert all(a.loss > b.loss or a.size_mb > b.size_mb for a, b in pairwise(front)), "one beats another"
    one.trials.close()


def test_a_search_closes_in_on_where_a_limit_is_just_held(tmp_path: Path) -> None:
    one = search(tmp_path, Bench(LIMITS), trials=20)
    one.go()
    won = one.winner("strong")
    assert won is not None
    least = min(c.macs for c in one.candidates.values() if c.state == "passed" and c.scheme == "int8-dynamic")
    # Here 0.4 points may go: merged alone 36 hundredths, pruned alone 18.
    assert won[0].macs == least <= 0.66e9, [(c.label, c.loss) for c in one.candidates.values()]
    one.trials.close()


def test_what_cannot_be_fast_enough_any_more_never_goes_to_a_board(tmp_path: Path) -> None:
    bench = Bench(LIMITS)
    one = search(tmp_path, bench, trials=40)
    one.go()
    dropped = [c for c in one.candidates.values() if "strong" in c.hopeless]
    assert dropped and all("predicted" in c.hopeless["strong"] for c in dropped)
    assert not {c.key for c in dropped} & {key for _, _, key in bench.measured}
    table = one.table("strong")
    assert table.error is not None and table.error < 0.05 and table.held_out >= 3
    one.trials.close()


def test_a_search_that_is_done_builds_and_measures_nothing_more(tmp_path: Path) -> None:
    first = search(tmp_path, Bench(LIMITS))
    first.go()
    first.trials.close()
    bench = Bench(LIMITS)
    again = search(tmp_path, bench, runs=first.runs)
    again.go()
    assert bench.measured == [] and len(bench.built) == 1, "only the baseline is looked at, which the cache has"
    assert again.winner("strong") == first.winner("strong")
    again.trials.close()
    more = search(tmp_path, bench := Bench(LIMITS), trials=28, runs=first.runs)
    more.go()
    assert len(more.candidates) == 28 and len(bench.built) == 5, "a greater effort goes on where the smaller one ended"
    more.trials.close()


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_whatever_kills_a_search_it_goes_on_and_nothing_is_measured_twice(tmp_path: Path, after: int) -> None:
    whole = search(tmp_path / "whole", Bench(LIMITS))
    whole.go()
    whole.trials.close()
    killed = search(tmp_path / "killed", first := Bench(LIMITS, killed_after=after))
    with pytest.raises(KeyboardInterrupt):
        killed.go()
    killed.trials.close()
    resumed = search(tmp_path / "killed", second := Bench(LIMITS), runs=killed.runs)
    resumed.go()
    assert [c.key for c in resumed.candidates.values()] == [c.key for c in whole.candidates.values()], "it drew something else"
    won, expected = resumed.winner("strong"), whole.winner("strong")
    assert won is not None and expected is not None and won[0].key == expected[0].key
    best = {c.key for c in resumed.front("strong")} | {resumed.baseline.key}
    twice = (set(first.measured) & set(second.measured)) - {m for m in first.measured if m[2] in best}
    assert not {m for m in twice if m[1] == "quick"}
    ranked = {c.key for c in resumed.ranked("strong")[:1]}
    assert len(twice) <= 1 + len(ranked), "only what later candidates are compared with is measured again"
    resumed.trials.close()


def test_a_target_that_dies_leaves_the_others_their_search(tmp_path: Path) -> None:
    bench = Bench(LIMITS, dies_after=1)
    one = search(tmp_path, bench, targets=("strong", "weak"))
    one.go()
    assert one.dead == {"weak": "it was lost on the way"} and one.winner("strong") is not None and len(one.candidates) == 24
    one.trials.close()
    back = search(tmp_path, bench := Bench(LIMITS), targets=("strong", "weak"), runs=one.runs)
    back.go()
    assert {target for target, _, _ in bench.measured} == {"weak"}, "what it missed is made up for, and nothing else"
    assert back.winner("weak") is not None
    back.trials.close()


def test_what_is_too_large_by_its_weights_alone_is_never_built(tmp_path: Path) -> None:
    bench = Bench(Limits(5.0, size_mb=4.5))
    bulk = Bulk(linear=4_800_000, factorable=4_800_000, macs=1_000_000_000, uses=200)
    one = search(tmp_path, bench, least_mb=lambda drawn: least_mb(drawn, bulk))
    one.go()
    large = [c for c in one.candidates.values() if "not built" in c.reason]
    assert large and not {c.key for c in large} & set(bench.built)
    assert {(c.state, c.built) for c in large} == {("misses", False)} and all(c.size_mb > 4.5 for c in large)
    assert one.baseline.key in bench.built and one.winner("strong") is not None
    one.trials.close()

    few = search(tmp_path / "few", Bench(Limits(5.0, size_mb=2.8)), trials=8, least_mb=lambda drawn: least_mb(drawn, bulk))
    few.go()
    found = answer(few, "strong")
    least = min(c.size_mb for c in few.candidates.values() if not c.built)
    assert found.nearest is not None and found.unbuilt is not None and found.unbuilt.size_mb == least
    shown = printed(render_answers([found], few.limits, few.ended))
    assert "smaller, but not built:" in shown and f"size at least {least:.2f} MB" in shown
    few.trials.close()

    nothing = search(tmp_path / "none", Bench(Limits(5.0, size_mb=0.5)), trials=6, least_mb=lambda drawn: least_mb(drawn, bulk))
    nothing.go()
    assert all(c.built for c in nothing.candidates.values() if c.state != "failed"), "the nearest of all is asked for then"
    nothing.trials.close()


@given(st.integers(0, 2**32))
def test_no_draw_can_be_smaller_than_the_smallest(seed: int) -> None:
    bulk = Bulk(linear=4_800_000, factorable=5_000_000, macs=1_000_000_000, uses=200)
    drawn = recipe_of(draw(Dice(seed), WHOLE), WHOLE)
    least = {recipe_of(one, WHOLE).scheme: least_mb(recipe_of(one, WHOLE), bulk) for one in smallest(WHOLE)}
    assert least[drawn.scheme] - 1e-9 <= least_mb(drawn, bulk) <= 4.8 * LEAST_BITS[drawn.scheme] / 8 + 1e-9


def test_where_nothing_meets_the_limits_the_nearest_is_named_with_what_it_misses(tmp_path: Path) -> None:
    one = search(tmp_path, Bench(Limits(0.5, size_mb=3.0)), trials=12)
    one.go()
    found = answer(one, "strong")
    assert found.winner is None and found.nearest is not None
    assert any(text.startswith(("size", "loss")) for text in found.nearest.misses)
    shown = printed(render_answers([found], one.limits, one.ended))
    assert "nothing meets the limits" in shown and "it misses:" in shown
    assert to_json(one, [found])["targets"][0]["winner"] is None
    one.trials.close()


def remade(came: Measured, **changes: Any) -> Measured:
    """What came home, with every series changed."""

    def change(run: Any) -> Any:
        changed = [replace(m, series=tuple(replace(s, **changes) for s in m.series)) for m in run.measurements]
        return replace(run, measurements=tuple(changed))

    return replace(came, runs={target: [change(run) for run in group] for target, group in came.runs.items()})


def test_what_could_not_be_fast_enough_is_not_called_the_nearest(tmp_path: Path) -> None:
    one = search(tmp_path, Bench(Limits(0.5, p90_ms=4.0)), trials=40)
    one.go()
    assert any("strong" in c.hopeless for c in one.candidates.values())
    nearest = answer(one, "strong").nearest
    assert nearest is not None and nearest.figures is not None, f"{nearest.misses} misses by nobody knows how much"
    assert nearest.misses[0].startswith("p90") and "predicted" not in nearest.misses[0]
    one.trials.close()


def test_what_the_confirmation_made_of_the_nearest_is_said(tmp_path: Path) -> None:
    class Crowded(Bench):
        def measure(self, wanted: Mapping[str, Sequence[Candidate]], plan: Any) -> Measured:
            came = super().measure(wanted, plan)
            return remade(came, foreign_cpu=6.0) if plan.name == "quick" else came

    one = search(tmp_path, Crowded(LIMITS), trials=6)
    one.go()
    found = answer(one, "strong")
    assert found.winner is None and found.nearest is not None
    shown = printed(render_answers([found], one.limits, one.ended))
    assert "it misses: measured at length it gave no figure: INVALID" in shown, "it held all limits, and nothing meets them"
    one.trials.close()


class Slow(Bench):
    """So few samples come in time in the plans named ``short`` that they tell no p90."""

    short: tuple[str, ...] = ("tune",)

    def measure(self, wanted: Mapping[str, Sequence[Candidate]], plan: Any) -> Measured:
        came = super().measure(wanted, plan)
        return remade(came, samples_ns=(10**7,) * 20) if plan.name in self.short else came


def test_a_board_too_slow_for_a_p90_in_the_search_has_its_winner_by_the_confirmation(tmp_path: Path) -> None:
    one = search(tmp_path, Slow(Limits(0.5, p90_ms=30.0)), trials=8)
    one.go()
    won = one.winner("strong")
    assert won is not None and won[1].p90_ms is not None and won[1].p90_ms <= 30.0
    one.trials.close()


def test_a_limit_that_no_confirmation_tells_does_not_confirm_everything(tmp_path: Path) -> None:
    bench = Slow(Limits(0.5, p90_ms=30.0))
    bench.short = ("tune", "quick")
    one = search(tmp_path, bench, trials=16)
    one.go()
    found = answer(one, "strong")
    assert found.winner is None and found.nearest is not None
    assert any("p90_ms was not measured" in text for text in found.nearest.misses)
    assert len(one.ranked("strong")) > 4 and len({key for _, plan, key in bench.measured if plan == "quick"}) <= 4
    one.trials.close()


def test_invalid_figures_count_only_anyway_and_are_not_measured_for_ever(tmp_path: Path) -> None:
    bench = Bench(LIMITS, invalid=True)
    one = search(tmp_path / "a", bench, trials=6)
    one.go()
    found = answer(one, "strong")
    assert found.winner is None and max(bench.measured.count(m) for m in bench.measured if m[2] != one.baseline.key) == 2
    assert found.nearest is not None and any("INVALID" in text for text in found.nearest.misses)
    one.trials.close()
    anyway = search(tmp_path / "b", Bench(LIMITS, invalid=True), trials=6, anyway=True)
    anyway.go()
    assert anyway.winner("strong") is not None
    anyway.trials.close()


def test_jobs_that_end_before_they_come_to_a_candidate_are_tried_twice_and_not_for_ever(tmp_path: Path) -> None:
    bench = Bench(LIMITS, empty="weak")
    one = search(tmp_path, bench, trials=6, targets=("strong", "weak"))
    one.go()
    assert one.winner("strong") is not None and one.winner("weak") is None
    tried = [key for target, _, key in bench.measured if target == "weak" and key != one.baseline.key]
    assert {tried.count(key) for key in tried} == {2}
    nearest = answer(one, "weak").nearest
    assert nearest is not None and any("interrupted, the power went" in text for text in nearest.misses)
    one.trials.close()


def test_no_training_eats_up_the_budget(tmp_path: Path) -> None:
    bench = Bench(LIMITS)
    one = search(tmp_path, bench, trials=6, seconds=600.0)
    one.go()
    assert bench.training_s and max(bench.training_s) <= 60.0
    one.trials.close()


class Trainer(Bench):
    """Pruning stands for training here: it takes a minute."""

    def evaluate(self, drawn: Sequence[tuple[int, Drawn]], training_s: float) -> list[Candidate]:
        self.evaluated = max(getattr(self, "evaluated", 0), len(drawn))
        made = super().evaluate(drawn, training_s)
        long = [any(s.kind == "prune" for s in c.recipe.steps) and training_s < 60.0 for c in made]
        bare = {"state": "too long", "bundle": "", "size_mb": 0.0, "training_s": 60.0}
        return [replace(c, reason=f"{training_s:g} s", **bare) if wait else c for c, wait in zip(made, long, strict=True)]


def test_a_search_learns_which_trainings_take_too_long(tmp_path: Path) -> None:
    one = search(tmp_path, Trainer(LIMITS), trials=60, seconds=300.0)
    one.go()
    seeded = len(seeds(SMALL))
    own = [c.state == "too long" for c in sorted(one.candidates.values(), key=lambda c: c.number) if c.number > 2 * seeded]
    assert sum(own[-15:]) <= 5 < 15 <= len(own), "half of what is drawn without learning prunes"
    one.trials.close()


def test_a_greater_budget_tries_what_took_too_long_for_the_smaller_one(tmp_path: Path) -> None:
    def states(one: Search) -> dict[str, str]:
        return {c.key: c.state for c in one.candidates.values() if any(s.kind == "prune" for s in c.recipe.steps)}

    first = search(tmp_path, Trainer(LIMITS), trials=12, seconds=300.0)
    first.go()
    first.trials.close()
    assert set(states(first).values()) == {"too long"}
    same = search(tmp_path, Trainer(LIMITS), trials=12, seconds=300.0, runs=first.runs)
    same.go()
    same.trials.close()
    assert same.candidates == first.candidates
    more = search(tmp_path, trainer := Trainer(LIMITS), trials=14, seconds=3000.0, runs=first.runs)
    more.go()
    more.trials.close()
    assert trainer.evaluated <= AT_ONCE, "all at once they would be built whatever the budget"
    assert states(first).keys() <= states(more).keys() and "too long" not in states(more).values()


def test_a_search_whose_builds_are_gone_begins_anew(tmp_path: Path) -> None:
    class Rebuilt(Bench):
        def made(self, number: int, drawn: Drawn) -> Candidate:
            c = super().made(number, drawn)
            return replace(c, bundle=runs.sha(f"{c.bundle} of another version")) if c.built else c

    first = search(tmp_path, Bench(LIMITS))
    first.go()
    first.trials.close()
    again = search(tmp_path, Rebuilt(LIMITS), runs=first.runs)
    again.go()
    old = {c.bundle for c in first.candidates.values()} - {""}
    assert not old & {c.bundle for c in again.candidates.values()}, "what is counted could not be packed any more"
    assert len(again.candidates) == 24 and again.winner("strong") is not None
    again.trials.close()


def test_other_images_in_another_place_are_another_search(home: Path, tmp_path: Path) -> None:
    from PIL import Image

    from edgevit.cache import Cache
    from edgevit.cli.tune import what_is_asked, what_is_given

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = ("pretrained", "weights", "random_weights", "labels", "unsafe_pickle", "img_size", "crop_pct", "interpolation")
    digests = set()
    for calib, train in ((tmp_path, ()), (None, (tmp_path,))):
        options: dict[str, Any] = {**dict.fromkeys((*names, "num_classes", "mean", "std")), "model": "m", "model_args": {}}
        options |= {"eval_data": tmp_path, "calib_data": calib, "train_data": train, "model_formats": ("onnx",), "batch": 1}
        model, given_ = what_is_given(options, Cache())
        digests.add(what_is_asked(model, given_, options, {}, tmp_path, [])[1])
    assert len(digests) == 2, "a search with calibration images would go on where one with training images stood"


def test_a_spent_budget_ends_a_search(tmp_path: Path) -> None:
    one = search(tmp_path, Bench(LIMITS), seconds=1e-9)
    one.go()
    assert len(one.candidates) == 1 and "spent" in one.ended, "the baseline alone"
    one.trials.close()


def test_the_answer_fits_100_columns(tmp_path: Path) -> None:
    one = search(tmp_path, Bench(LIMITS), targets=("strong", "weak"))
    one.go()
    found = [answer(one, t) for t in one.targets]
    shown = printed(render_answers(found, one.limits, one.ended))
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "★" in shown and "median error" in shown and "evidence: runs" in shown and "p90" in shown
    assert "top-1 was not counted there" in shown, "these boards count none, and the loss is passed off as theirs"
    one.trials.close()


def test_a_full_disk_ends_a_search_with_an_error_and_the_search_goes_on_later(tmp_path: Path) -> None:
    with Trials(tmp_path, 0) as full:
        full.set("spent_s", 1.0)
        ((pages,),) = full._execute("PRAGMA page_count")
        full._execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="cannot be kept: database or disk is full"):
            full.set("space", "x" * 100_000)
    with Trials(tmp_path, 0) as later:
        assert later.get("spent_s") == 1.0 and later.get("space") is None


def test_two_of_the_same_search_do_not_run_at_once(tmp_path: Path) -> None:
    with Trials(tmp_path, 0), pytest.raises(UsageError, match="running already"):
        Trials(tmp_path, 0)


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match="tune"):
        Trials(tmp_path, 0)


def test_predictions_are_kept_for_what_a_file_is_fed() -> None:
    """A file that takes floats, as of a model whose image several layers read, answers otherwise by another mean."""
    from types import SimpleNamespace

    from device_agents.wire import Preprocessing
    from edgevit.tune.work import score_key

    file: Any = SimpleNamespace(blob=SimpleNamespace(sha256=runs.sha("file")), format="onnx")
    one = Preprocessing(32, 32, 32, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    keys = {score_key(file, p, runs.sha("images")) for p in (one, replace(one, mean=(0.1, 0.2, 0.3)), one)}
    assert len(keys) == 2


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from edgevit.engines import open_engine

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="ray"), open_engine("ray", 1):
        pass


def test_a_ray_node_with_other_tools_refuses_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit import cache, ray_engine
    from edgevit.workers import Failure, Task

    (tmp_path / "token").write_text("seen")
    shared = ray_engine.Shared(tmp_path / "token", "seen", ray_engine.made_by())
    task = Task("double", lambda n, progress: 2 * n, 4)
    assert ray_engine.work_on(task, shared)[0] == 8
    monkeypatch.setattr(cache, "tool_versions", lambda: {"torch": "0.1"})
    refused, _ = ray_engine.work_on(task, shared)
    assert isinstance(refused, Failure) and "what it builds with" in refused.message


def printed(what: Any) -> str:
    text = io.StringIO()
    Console(width=100, file=text, highlight=False).print(what)
    return text.getvalue()
