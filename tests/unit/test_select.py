"""The choice of a variant: what must not run is never chosen, and of the rest the policy takes what it says, in any order."""

from __future__ import annotations

import dataclasses
import random
import re
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents import wire
from device_agents.wire import Refusal, Verdict
from edgevit.cli.selection import choose_stored
from edgevit.errors import NoChoice, UsageError
from edgevit.results.percentiles import median_interval, percentile
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary
from edgevit.select import POLICIES, Choice, Gates, admit, choose, find_evidence, variant_of
from edgevit.variants import Runnable
from tests.support.judged import summaries
from tests.support.runs import measurement, run

IMAGES = 500
BASE = summaries(run())[0]
VALID, INVALID = Verdict(1, True, (), ()), Verdict(1, False, ("the board was throttled",), ())


def measured(name: str, p50: float = 10.0, correct: int | None = 400, scheme: str = "fp32", **changes: Any) -> Summary:
    """One variant's figures on one device."""
    values = {
        "artifact": name, "scheme": scheme, "bundle": BASE.bundle, "threads": 1, "failure": "", "verdict": VALID,
        "p50_ms": p50, "p50_interval_ms": (p50 * 0.98, p50 * 1.02), "file_mb": 20.0,
        "top1": None if correct is None else correct / IMAGES, "images": 0 if correct is None else IMAGES,
        "top1_absent": "" if correct is not None else "the bundle has no labelled images",
    }  # fmt: skip
    return dataclasses.replace(BASE, **{**values, **changes})


def names(choice: Choice) -> dict[str, str]:
    return {d.variant.artifact: d.reason for d in choice.dropped}


FLOAT, INT8 = measured("f", 20.0), measured("q", 8.0, 398, "int8-dynamic", file_mb=6.0)


def test_each_policy_takes_what_it_says() -> None:
    several = [FLOAT, INT8, measured("h", 21.0, 400, "fp16", file_mb=11.0), measured("s", 9.0, 396, "int8-static", file_mb=5.9)]
    chosen = {policy: choose(several, policy).variant.artifact for policy in POLICIES}
    assert chosen == {"fastest": "q", "smallest": "s", "most-accurate": "f"}
    choice = choose(several, "fastest")
    assert choice.runs == (BASE.run_id,) and choice.reason == "8.00 (7.84–8.16) ms"
    assert [d.variant.artifact for d in choice.behind] == ["s", "f", "h"] and not choice.dropped and not choice.not_held


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"failure": "golden-mismatch: cosine 0.61"}, "golden-mismatch"),
        ({"mismatch": "cosine 0.61"}, "other outputs than recorded"),
        ({"verdict": INVALID}, "INVALID: the board was throttled"),
        ({"top1": 394 / IMAGES}, "loses 1.20 points of top-1 against f"),
        ({"top1": None, "top1_absent": "worker-died: killed"}, "its top-1 was not counted: worker-died"),
        ({"p50_ms": 20.1, "p50_interval_ms": (19.0, 21.0)}, r"int8 slower than float here: .*; the intervals overlap"),
        ({"p50_ms": None, "p50_absent": "nothing was timed"}, "nothing was timed"),
    ],
)
def test_what_must_not_run_is_never_chosen(policy: str, bad: dict[str, Any], why: str) -> None:
    good = {"p50_ms": 1.0, "file_mb": 0.1, "top1": 1.0}  # best at everything, but for what is bad about it
    choice = choose([FLOAT, dataclasses.replace(INT8, **{**good, **bad})], policy)
    assert choice.variant.artifact == "f"
    assert re.search(why, names(choice)["q"])


def test_a_float_that_must_not_run_does_not_show_int8_to_be_slow() -> None:
    """The page chooses among many bundles: one that prunes too much, in float, is faster than any int8 of the whole model."""
    pruned = measured("p", 4.0, 300)
    admission = admit([FLOAT, INT8, pruned], Gates())
    assert [s.artifact for s in admission.admitted] == ["f", "q"]
    assert [d.reason.split(" against")[0] for d in admission.dropped] == ["loses 20.00 points of top-1"]


def test_top1_on_other_images_is_no_loss_and_no_gain() -> None:
    """The page holds bundles beside each other that may have been built with other images."""
    other = measured("q", 8.0, 300, "int8-dynamic", evaluation="harder")
    dropped = admit([FLOAT, other], Gates()).dropped
    assert [d.reason.split(" (")[0] for d in dropped] == ["its top-1 was counted on other images"]
    beside = measured("g", 20.0, 302, evaluation="harder")
    assert {s.artifact for s in admit([FLOAT, other, beside], Gates()).admitted} == {"f", "g", "q"}


def test_a_float_that_is_not_valid_cannot_show_int8_to_be_faster() -> None:
    """Whether int8 is slower than float is not known then, so it is not chosen either."""
    with pytest.raises(NoChoice, match="no float variant has a VALID figure") as caught:
        choose([dataclasses.replace(FLOAT, verdict=INVALID), INT8], "fastest")
    assert "--variants" in caught.value.hint


def test_invalid_figures_count_where_asked_but_other_outputs_never() -> None:
    shaky = [dataclasses.replace(s, verdict=INVALID) for s in (FLOAT, INT8)]
    choice = choose(shaky, "fastest", Gates(anyway=True))
    assert choice.variant.artifact == "q" and choice.anyway
    with pytest.raises(NoChoice):
        choose([dataclasses.replace(FLOAT, mismatch="cosine 0.2")], "fastest", Gates(anyway=True))


def test_gates_that_cannot_be_held_are_named() -> None:
    assert "no float variant was measured" in choose([INT8], "fastest").not_held[0]
    blind = [dataclasses.replace(s, top1=None, top1_absent="built without --eval") for s in (FLOAT, INT8)]
    assert choose(blind, "fastest").not_held == ("loss of accuracy could not be told: built without --eval",)
    with pytest.raises(NoChoice, match="built without --eval") as caught:
        choose(blind, "most-accurate")
    assert "--eval" in caught.value.hint
    few = [dataclasses.replace(s, images=24, top1=20 / 24) for s in (FLOAT, INT8)]
    assert choose(few, "fastest").not_held == ("top-1 was counted on 24 images: one of them is 4.2 points",)


def test_a_choice_is_of_one_bundle_on_one_target() -> None:
    with pytest.raises(UsageError, match="one bundle on one target"):
        choose([FLOAT, dataclasses.replace(INT8, target="other")], "fastest")
    with pytest.raises(UsageError, match="expected one of fastest"):
        choose([FLOAT], "quickest")


# ---- properties -----------------------------------------------------------------------------------------------------

SCHEMES = st.sampled_from(["fp32", "fp16", "int8-dynamic", "int8-static", "int4-weights"])


NOTHING: dict[str, Any] = {}
BAD = st.sampled_from([NOTHING, NOTHING, NOTHING, {"failure": "x: y"}, {"verdict": INVALID}, {"mismatch": "z"}])


@st.composite
def figures(draw: st.DrawFn) -> list[Summary]:
    """Variants of one bundle with coarse figures, so that ties are common; the first one is float, measured and scored."""
    out = []
    for i in range(draw(st.integers(1, 7))):
        scored = i == 0 or draw(st.booleans())
        bad = {} if i == 0 else draw(BAD)
        out.append(
            measured(
                f"a{draw(st.integers(0, 3))}", draw(st.integers(1, 8)) * 1.0, draw(st.integers(380, 400)) if scored else None,
                "fp32" if i == 0 else draw(SCHEMES), threads=i + 1, file_mb=draw(st.integers(1, 4)) * 1.0, **bad,
            )
        )  # fmt: skip
    return out


def outcome(several: list[Summary], policy: str, gates: Gates) -> Choice | str:
    """The choice, or why there is none."""
    try:
        return choose(several, policy, gates)
    except NoChoice as e:
        return str(e).partition("as ")[2]


@given(figures(), st.sampled_from(POLICIES), st.floats(0, 5), st.booleans(), st.randoms())
@settings(deadline=None)
def test_order_is_nothing_and_nobody_is_forgotten(
    several: list[Summary], policy: str, loss: float, anyway: bool, rng: random.Random
) -> None:
    gates = Gates(loss, anyway)
    shuffled = list(several)
    rng.shuffle(shuffled)
    choice = outcome(several, policy, gates)
    assert outcome(shuffled, policy, gates) == choice
    if isinstance(choice, str):
        return
    told = {choice.variant, *(d.variant for d in (*choice.behind, *choice.dropped))}
    unscored = {variant_of(s) for s in several if s.top1 is None} if policy == "most-accurate" else set()
    assert told | unscored == {variant_of(s) for s in several}
    assert wire.decode(Choice, wire.encode(choice), "choice") == choice, "it is stored and comes back whole"


@given(figures(), st.floats(0, 5), st.booleans())
@settings(deadline=None)
def test_what_is_chosen_holds_every_gate_and_nothing_admitted_is_better(
    several: list[Summary], loss: float, anyway: bool
) -> None:
    gates = Gates(loss, anyway)
    admitted = admit(several, gates).admitted
    by_variant = {variant_of(s): s for s in several}
    ok = [s for s in several if not s.failure and not s.mismatch]
    floats = [s for s in ok if s.scheme in ("fp32", "fp16")]
    top = max(s.top1 for s in floats if s.top1 is not None and s.scheme == "fp32")
    sound = [s for s in floats if s.top1 is not None and 100 * (top - s.top1) <= loss + 1e-9]
    best = min((s.p50_ms for s in sound if (s.verdict.valid or anyway) and s.p50_ms is not None), default=0.0)
    for policy in POLICIES:
        choice = outcome(several, policy, gates)
        if isinstance(choice, str):
            assert not admitted, "whoever is admitted was scored, so every policy has somebody to choose"
            continue
        s = by_variant[choice.variant]
        assert s in ok and (s.verdict.valid or anyway) and s.p50_ms is not None and s.top1 is not None
        assert 100 * (top - s.top1) <= loss + 1e-6
        assert not (s.scheme.startswith("int8") and s.p50_ms > best), "int8 slower than float"
        if policy == "fastest":
            assert s.p50_ms == min(a.p50_ms for a in admitted if a.p50_ms is not None)
        elif policy == "smallest":
            assert s.file_mb == min(a.file_mb for a in admitted if a.file_mb is not None)
        else:
            assert s.top1 == max(a.top1 for a in admitted if a.top1 is not None)


@given(figures(), st.floats(0, 5), st.floats(0, 5))
@settings(deadline=None)
def test_a_stricter_gate_admits_nobody_new_but_int8_that_a_worse_float_outran(
    several: list[Summary], a: float, b: float
) -> None:
    strict, loose = (admit(several, Gates(loss)) for loss in sorted((a, b)))
    outran = {d.variant for d in loose.dropped if d.reason.startswith("int8 slower than float")}
    assert {variant_of(s) for s in strict.admitted} <= {variant_of(s) for s in loose.admitted} | outran


# ---- evidence -------------------------------------------------------------------------------------------------------


def test_evidence_is_the_run_with_most_of_what_runs_there_the_newest_of_equals() -> None:
    bundle = measurement().variant.bundle

    def of(names: str, run_id: str, started: str, version: str = "1.31.1") -> wire.Run:
        made = []
        for i, name in enumerate(names):
            m = measurement(samples=8, processes=1, seed=i)
            series = tuple(dataclasses.replace(s, runtime_version=version) for s in m.series)
            made.append(dataclasses.replace(m, variant=dataclasses.replace(m.variant, artifact=name), series=series))
        return run(run_id=run_id, measurements=tuple(made), started_at=started)

    can_run = [dataclasses.replace(measurement().variant, artifact=name) for name in "abc"]
    old, newer, part = of("abc", "old", "2025-01-01"), of("abcx", "newer", "2025-02-01"), of("ab", "part", "2025-03-01")
    other = of("abc", "other-version", "2025-04-01", "1.19.2")
    versions = {"onnxruntime": "1.31.1"}
    found, missing = find_evidence([part, newer, other, old], bundle, can_run, versions)
    assert ({s.run_id for s in found}, {s.artifact for s in found}, missing) == ({"newer"}, set("abc"), ())
    found, missing = find_evidence([part], bundle, can_run, versions)
    assert len(found) == 2 and [v.artifact for v in missing] == ["c"]
    assert find_evidence([other], bundle, can_run, versions) == ([], tuple(can_run)), "another runtime is another program"
    assert find_evidence([old], "0" * 64, can_run, versions)[0] == []


def test_a_variant_that_failed_there_is_evidence_too() -> None:
    m = measurement(samples=0, failure=Refusal("golden-mismatch", "cosine 0.1", ""))
    found, missing = find_evidence([run(measurements=(m,))], m.variant.bundle, [m.variant], {"onnxruntime": "1.31.1"})
    assert [s.failure for s in found] == ["golden-mismatch: cosine 0.1"] and missing == ()


def test_figures_of_another_board_that_had_the_name_are_no_evidence() -> None:
    """A target that was added anew with its old name may be another kind of board: what is fastest there is not known."""
    made = run(measurements=(measurement(),))
    variant = made.measurements[0].variant
    store = types.SimpleNamespace(runs=lambda **asked: [made])
    manifest = types.SimpleNamespace(name="bird", version=3)
    bundle = types.SimpleNamespace(digest=variant.bundle, path=Path("bird"), manifest=manifest)

    def chosen(facts: wire.Facts) -> Choice:
        found = Runnable((variant,), ())
        return choose_stored(store, "pi4", bundle, facts, found, "fastest", Gates(anyway=True))  # type: ignore[arg-type]

    assert chosen(made.facts).variant == variant
    with pytest.raises(NoChoice, match="pi4: bird version 3 was not measured there yet"):
        chosen(dataclasses.replace(made.facts, board_model="Raspberry Pi 5 Model B Rev 1.0"))


# ---- the interval ---------------------------------------------------------------------------------------------------


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        low, high = median_interval([[int(rng.lognormvariate(10, 0.3) * 1000) for _ in range(64)]]) or (0, 0)
        covered += low <= 22_026_466 <= high  # e^10 thousand: the true median
    assert 0.93 * 400 <= covered <= 400, f"{covered} of 400"


@given(st.lists(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_interval_holds_the_median_and_every_process(series: list[list[int]]) -> None:
    interval = median_interval(series)
    pooled = sorted(v for one in series for v in one)
    if len(pooled) < 6:
        assert interval is None, "0.5^n at each end is more than 5 % in all"
        return
    assert interval is not None
    inside = [percentile(pooled, 0.5), *(percentile(sorted(one), 0.5) for one in series)]
    assert interval[0] <= min(inside) and max(inside) <= interval[1] <= pooled[-1]


def test_summaries_carry_the_interval_and_a_mismatch() -> None:
    m = measurement(p50_ms=50.0)
    (s,) = summarize(run(measurements=(m,)))
    assert s.p50_interval_ms is not None and s.p50_ms is not None
    assert s.p50_interval_ms[0] <= s.p50_ms <= s.p50_interval_ms[1] < 1.1 * s.p50_interval_ms[0] and s.mismatch == ""
    bad = dataclasses.replace(m.series[1].golden, passed=False, reason="cosine 0.2")
    wrong = dataclasses.replace(m, series=(m.series[0], dataclasses.replace(m.series[1], golden=bad)))
    assert summarize(run(measurements=(wrong,)))[0].mismatch == "cosine 0.2"
