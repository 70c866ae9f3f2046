"""The pure parts of a roll-out: waves, gates, what comes next, how long to wait, how long it will take."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.wire import Accuracy, Active, InstalledBundle, Run
from edgevit.cli import rollout
from edgevit.cli.rollout_options import make_rollout
from edgevit.cli.ship import Order, Shipped
from edgevit.errors import GateFailed, LostLink, Unreachable, UsageError
from edgevit.fleet.audit import Entry
from edgevit.fleet.check import judge_pin
from edgevit.fleet.deploy import check_pin
from edgevit.fleet.gates import GATES, Limits, find_stored, find_unjudgeable, judge_accuracy, judge_memory, judge_run
from edgevit.fleet.inventory import Target
from edgevit.fleet.operator import has_ended, this_operator
from edgevit.fleet.pace import estimate
from edgevit.fleet.retry import LONGEST_S, backoff_s, keep_trying
from edgevit.fleet.rollout import Decision, Member, Share, decide, parse_share, plan_waves
from edgevit.progress import Progress
from tests.support.bundles import make_manifest
from tests.support.runs import facts
from tests.unit.test_compare import change_series, compared

# ---- waves ----------------------------------------------------------------------------------------------------------

shares = st.one_of(
    st.integers(1, 60).map(lambda n: Share(n, False)), st.integers(1, 100_000).map(lambda p: Share(p / 1000, True))
)


@given(st.lists(shares, min_size=1, max_size=6), st.integers(1, 50))
def test_waves_take_every_device_once_in_the_given_order(wanted: list[Share], count: int) -> None:
    names = [f"pi-{n:02}" for n in range(count)]
    sizes = [share.at_least(count) for share in wanted]
    if sizes != sorted(sizes):
        with pytest.raises(UsageError, match="waves count from the beginning"):
            plan_waves(wanted, names)
        return
    waves = plan_waves(wanted, names)
    assert [name for wave in waves for name in wave] == names[: sizes[-1]]
    assert all(waves) and len(waves) <= len(wanted)
    assert {sum(len(w) for w in waves[: i + 1]) for i in range(len(waves))} == set(sizes)


def test_waves_by_hand() -> None:
    names = list("abcdefgh")
    waves = plan_waves([parse_share(t, "--wave") for t in ("1", "25%", "100%")], names)
    assert waves == (("a",), ("b",), tuple("cdefgh"))
    assert plan_waves([Share(29, True)], [str(n) for n in range(100)])[0][-1] == "28", "29 % of 100 devices are 29"


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "101%", "1e3", "%", "25 %"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a count such as 3 or a share such as 25%"):
        parse_share(text, "--wave")


def test_a_wave_of_nobody_is_refused() -> None:
    with pytest.raises(UsageError, match="is none"):
        plan_waves([parse_share("0", "--wave")], ["a"])


def test_options_of_waves_need_a_wave() -> None:
    given_ = dict.fromkeys(("max_p90_growth", "max_memory_growth", "max_top1_loss", "max_failed", "gate_blocks"))
    assert make_rollout(waves=(), without_gate=(), pause=False, **given_) is None
    with pytest.raises(UsageError, match="--pause is for a roll-out in waves"):
        make_rollout(waves=(), without_gate=(), pause=True, **given_)
    made = make_rollout(waves=("1", "100%"), without_gate=("memory",), pause=False, **{**given_, "max_failed": "10%"})
    assert made is not None
    assert (made.limits.wanted, made.max_failed, made.blocks) == (("p90", "accuracy"), Share(10, True), 8)


# ---- what comes next ------------------------------------------------------------------------------------------------

standings = st.sampled_from(["passed", "gate failed", "failed"])
members = st.lists(standings, min_size=1, max_size=8).map(lambda s: [Member(f"d{i}", one, "why") for i, one in enumerate(s)])


@given(st.lists(members, max_size=3), members, shares, st.integers(0, 3))
def test_a_wave_goes_back_exactly_where_a_gate_did_not_hold(
    before: list[list[Member]], wave: list[Member], most: Share, left: int
) -> None:
    earlier = [m for one in before for m in one]
    decision = decide(earlier, wave, most, left)
    lost = [m for m in wave if m.end == "gate failed"]
    failed = sum(m.end == "failed" for m in earlier + wave)
    assert (decision.next == "roll back") == bool(lost)
    if not lost:
        stops = failed > most.at_most(len(earlier) + len(wave))
        assert decision.next == ("stop" if stops else "go on" if left else "finished")
    assert bool(decision.reasons) == (decision.next in ("roll back", "stop"))


def test_a_share_of_failures_is_of_those_tried_and_rounded_down() -> None:
    wave = [Member("a", "passed"), Member("b", "failed", "off")]
    assert decide([], wave, Share(50, True), 1).next == "go on"
    assert decide([], wave, Share(49, True), 1).reasons[0] == "1 of 2 devices failed, 49% allows 0"
    assert decide([], wave, Share(0, False), 1).next == "stop"


def test_a_device_that_could_not_go_back_is_named_with_why(capsys: pytest.CaptureFixture[str]) -> None:
    gate, stays = GateFailed("b: p90 grew"), GateFailed("b: nothing was active before, v2 stays active", hint="edgevit doctor")
    course = rollout.Course(shipped={"a": "was there", "b": "deployed"}, ends={"a": "rolled back", "b": "NOT rolled back"})
    course.failed += [("b", gate), ("b", stays)]
    decision = Decision("roll back", ("b: p90 grew",))
    assert rollout._report("tiny", course, decision, [("a", "b")], 1, as_json=False) == 1
    said = capsys.readouterr().err
    assert "error: b: nothing was active before, v2 stays active" in said and "error: b: p90 grew" not in said
    assert "wave 1 of 1 was rolled back, but for b:" in said


def test_a_wave_that_ctrl_c_ends_gives_back_the_locks_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every other operator would wait an hour for a roll-out that is over."""
    given_back: list[str] = []
    nothing: Any = None

    def ship(_order: Order, target: Target, _progress: Progress, *, keep_lock: bool) -> Shipped:
        assert keep_lock
        if target.name == "b":
            raise KeyboardInterrupt
        return Shipped(nothing, nothing, nothing, None, None, 1.0, 0, "")

    monkeypatch.setattr(rollout, "ship_one", ship)
    monkeypatch.setattr(rollout, "release_one", lambda _order, target: given_back.append(target.name))
    order = Order(SimpleNamespace(manifest=make_manifest()[0]), this_operator("deploy"))  # type: ignore[arg-type]
    targets = [Target(name=name, host=name) for name in "abc"]
    wave = rollout._Wave(order, nothing, targets, rollout.Course(), 1, 1)
    with pytest.raises(KeyboardInterrupt):
        wave.run(0)
    assert given_back == ["a"]


# ---- gates ----------------------------------------------------------------------------------------------------------


def p90_gate(before: list[float], now: list[float], growth: float) -> tuple[bool, bool, str]:
    made = compared(before, now)
    gate = judge_run(made, *made.job.variants, Limits(p90_growth=growth, without=("accuracy", "memory")))[0]
    return gate.held, gate.judged, gate.text


def test_p90_holds_only_where_its_whole_interval_does() -> None:
    assert p90_gate([10.0] * 6, [10.5] * 6, 5.1)[:2] == (True, True)
    held, judged, text = p90_gate([10.0] * 6, [11.0] * 6, 9.0)
    assert (held, judged) == (False, True) and text.startswith("p90 1.100 times what it was (1.100 to 1.100, 95 %)")
    held, judged, text = p90_gate([10.0] * 6, [9.5, 9.5, 10.5, 10.5, 10.0, 10.0], 5.0)
    assert (held, judged) == (False, False) and "leaves it open" in text


def test_p90_is_of_the_tail_and_not_of_the_median() -> None:
    made = compared([10.0] * 6, [10.0] * 6)
    tail = (10_000_000,) * 8 + (20_000_000,) * 2
    for number in range(6):
        made = change_series(made, 1, number, samples_ns=tail)
    gate = judge_run(made, *made.job.variants, Limits(without=("accuracy", "memory")))[0]
    assert not gate.held and "p90 2.000 times" in gate.text


def test_a_disturbed_comparison_cannot_be_judged_and_says_why() -> None:
    made = change_series(compared([10.0] * 6, [9.0] * 6), 1, 0, swapped_pages=40)
    (gate,) = judge_run(made, *made.job.variants, Limits(without=("accuracy", "memory")))
    assert (gate.held, gate.judged) == (False, False) and "2 of the 3 blocks" in gate.text and "swapped" in gate.text


def scored(correct: int, labels: tuple[int, ...] = (0,) * 100) -> Accuracy:
    return Accuracy(len(labels), correct, (0,) * len(labels), labels, "digits", False)


def test_accuracy_may_fall_by_so_many_points_on_the_same_images() -> None:
    assert judge_accuracy(scored(90), scored(89), "", 1.0).held
    assert not judge_accuracy(scored(90), scored(88), "", 1.0).held
    assert judge_accuracy(scored(80), scored(99), "", 0.0).held
    other = judge_accuracy(scored(90), scored(90, (1,) * 100), "", 1.0)
    assert not other.held and not other.judged and "other images" in other.text
    assert "no labels" in judge_accuracy(None, None, "no labels", 1.0).text


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.floats(0, 200))
def test_memory_may_grow_by_so_many_percent(before: float, now: float, growth: float) -> None:
    assert judge_memory(before, now, growth).held == (now <= before * (1 + growth / 100))
    assert not judge_memory(None, now, growth).judged


def test_a_variant_that_cannot_be_measured_fails_every_gate_and_one_from_before_leaves_them_open() -> None:
    made = compared([10.0] * 6, [10.0] * 6)
    from device_agents.wire import Refusal

    for side, judged in ((0, False), (1, True)):
        both = list(made.measurements)
        both[side] = dataclasses.replace(both[side], failure=Refusal("worker-died", "signal 9\nmore"))
        broken: Run = dataclasses.replace(made, measurements=tuple(both))
        gates = judge_run(broken, *made.job.variants, Limits())
        assert [g.name for g in gates] == list(GATES)
        assert not any(g.held for g in gates) and {g.judged for g in gates} == {judged}


def test_what_cannot_be_judged_is_known_before_anything_is_done() -> None:
    manifest, _ = make_manifest()
    before = compared([1.0], [1.0]).job.variants[0]
    here = facts(bundles=(InstalledBundle(before.bundle, "vit", 1),))
    assert [name for name, _ in find_unjudgeable(Limits(), manifest, here, None)] == list(GATES)
    damaged = dataclasses.replace(here, absent={"active": "active.json is damaged"})
    assert {why for _, why in find_unjudgeable(Limits(), manifest, damaged, None)} == {"active.json is damaged"}
    assert {why for _, why in find_unjudgeable(Limits(), manifest, facts(), before)} == {
        f"the bundle {before.bundle[:12]} that was active before is gone from it"
    }
    found = find_unjudgeable(Limits(), dataclasses.replace(manifest, evaluation=None), here, before)
    assert [name for name, _ in found] == ["accuracy"]
    assert find_unjudgeable(Limits(without=GATES), manifest, facts(), None) == []


def test_a_pin_holds_in_check_and_before_a_deployment() -> None:
    manifest, _ = make_manifest(version=3)
    variant = compared([1.0], [1.0]).job.variants[0]
    here = facts(active=Active(variant, manifest.name, 3, "", "2026-01-31T12:00:00Z"))
    right, wrong = (Target(name="pi", host="pi", pin=f"{manifest.name}@{version}") for version in (3, 2))
    assert judge_pin(right, here) == [] and judge_pin(right, facts()) == []
    (finding,) = judge_pin(wrong, here)
    assert finding.severity == "warning" and f"{manifest.name}@3 is active" in finding.message
    check_pin(right, manifest)
    check_pin(Target(name="pi", host="pi"), manifest)
    with pytest.raises(UsageError, match=f"pinned to {manifest.name}@2 in the fleet file, got {manifest.name}@3"):
        check_pin(wrong, manifest)


# ---- the audit log as memory ----------------------------------------------------------------------------------------


def entry(action: str, target: str = "pi", outcome: str = "done", seconds: float = 3.0, **details: str | int) -> Entry:
    return Entry("2026-01-31T12:00:00Z", "ann@desk", action, target, (), outcome, "", seconds, details)


def test_a_gate_counts_again_only_for_the_same_activation_under_the_same_limits() -> None:
    limits = Limits()
    log = [entry("gate", activated_at="T1", limits=limits.text())]
    assert find_stored(log, "pi", "T1", limits) is log[0]
    assert find_stored(log, "pi", "T2", limits) is None
    assert find_stored(log, "pi", "T1", Limits(p90_growth=5)) is None
    assert find_stored(log, "other", "T1", limits) is None
    assert find_stored([entry("gate", outcome="failed", activated_at="T1", limits=limits.text())], "pi", "T1", limits) is None


def test_seconds_come_from_what_was_measured_there_or_are_absent() -> None:
    sent = [entry("deploy", seconds=s, sent_bytes=20_000_000, send_ms=ms, activated=1) for s, ms in ((12, 10_000), (7, 5000))]
    assert estimate(sent, "other", 1, True).seconds is None
    made = estimate(sent, "pi", 30_000_000, True)
    assert made.seconds == pytest.approx(2.0 + 30 / 3.0) and "median of the last 2 uploads" in made.basis
    assert estimate(sent, "pi", 30_000_000, True, 8.0).seconds == pytest.approx(2.0 + 30 / 1.0), "--max-rate 8 is 1 MB a second"
    assert estimate(sent, "pi", 30_000_000, True, 800.0) == made, "the link itself is slower"
    small = [entry("deploy", sent_bytes=1000, send_ms=500, activated=1)]
    assert estimate(small, "pi", 30_000_000, True).absent == "nothing of 1 MB or more was sent there from here yet"
    lost = [entry("deploy", sent_bytes=20_000_000, send_ms=900, activated=1, links_lost=1)]
    assert estimate(lost, "pi", 1, True).seconds is None
    again = [*sent, entry("deploy", seconds=1.5, sent_bytes=0, send_ms=400)]
    assert estimate(again, "pi", 0, False).seconds == pytest.approx(1.5)


# ---- lost links -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.floats(0, 1, exclude_max=True))
def test_waits_double_up_to_a_limit_and_half_of_each_is_drawn(attempt: int, draw: float) -> None:
    whole = min(LONGEST_S, 2.0**attempt)
    assert whole / 2 <= backoff_s(attempt, draw) <= whole


class Link:
    """Fails as the list says, once a connection; ``None`` is a try that works."""

    def __init__(self, *ends: Exception | None) -> None:
        self.ends, self.waits, self.said = list(ends), [], []  # type: ignore[var-annotated]

    @contextmanager
    def connect(self) -> Iterator[None]:
        if isinstance(self.ends[0], Unreachable):
            raise self.ends.pop(0)  # type: ignore[misc]
        yield

    def work(self, _: None) -> str:
        end = self.ends.pop(0)
        if end is not None:
            raise end
        return "done"

    def run(self, retries: int = 3) -> tuple[str, int]:
        return keep_trying(
            self.connect, self.work, retries=retries, on_wait=self.said.append, draw=lambda: 0.0, sleep=self.waits.append
        )


def test_a_lost_link_is_taken_up_again_and_a_device_that_is_off_is_not_waited_for() -> None:
    link = Link(LostLink("cut"), Unreachable("rebooting"), None)
    assert link.run() == ("done", 2)
    assert link.waits == [0.5, 1.0] and link.said[0] == "trying again in 0.5 s (1 of 3): cut"
    off = Link(Unreachable("off"))
    with pytest.raises(Unreachable):
        off.run()
    assert off.waits == []
    gone = Link(*[LostLink("cut")] * 4)
    with pytest.raises(LostLink):
        gone.run()
    assert gone.waits == [0.5, 1.0, 2.0] and gone.ends == []
    broken = Link(ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        broken.run()


# ---- who holds the lock ---------------------------------------------------------------------------------------------


def test_a_token_tells_whether_its_process_still_runs_on_this_machine() -> None:
    mine = this_operator("deploy")
    assert not has_ended(mine.token) and mine.token != this_operator("deploy").token
    made = subprocess.run(
        [sys.executable, "-c", "from edgevit.fleet.operator import this_operator as o; print(o('x').token)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert has_ended(made)
    boot, space, pid, started, rest = mine.token.split(".")
    assert pid == str(os.getpid())
    assert has_ended(f"{boot}.{space}.{pid}.{int(started) + 1}.{rest}"), "the number was given to another process since"
    for other in (f"{'0' * 32}.{space}.1.5.{rest}", f"{boot}.1.{pid}.5.{rest}", "whatever", ""):
        assert not has_ended(other), "what ran elsewhere cannot be told"
