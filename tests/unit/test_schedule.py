"""The schedule: never two pieces on one device, at most so many at once, every device begun before any is waited for."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevit.cli import connect
from edgevit.cli.deploy import on_devices
from edgevit.errors import EdgevitError, Unreachable
from edgevit.fleet.inventory import Target, local_target
from edgevit.progress import Progress
from edgevit.schedule import Piece, Rest, Turn, choose_next, device_of, over_targets, run_schedule, sort_outcomes


class Watch:
    """Counts what is under way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: Counter[str] = Counter()
        self.most_at_once = 0
        self.most_on_one = 0

    def __call__(self, device: str) -> None:
        with self.lock:
            self.now[device] += 1
            self.most_at_once = max(self.most_at_once, self.now.total())
            self.most_on_one = max(self.most_on_one, self.now[device])
        threading.Event().wait(0.001)
        with self.lock:
            self.now[device] -= 1


def piece(name: str, device: str, rests: int = 0) -> Piece[str]:
    return Piece(name, device, lambda _turn: name, rests)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2))), st.sets(st.sampled_from("abcd")))
def test_the_next_piece_is_of_a_free_device_and_beginnings_come_first(given_: list[tuple[str, int]], busy: set[str]) -> None:
    waiting = [piece(str(i), device, rests) for i, (device, rests) in enumerate(given_)]
    index = choose_next(waiting, busy)
    free = [p for p in waiting if p.device not in busy]
    if not free:
        assert index is None
        return
    assert index is not None
    fewest = min(p.rests for p in free)
    assert waiting[index] is next(p for p in free if p.rests == fewest)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_all_is_done_once_in_order_and_never_two_on_one_device(devices: list[str], at_once: int) -> None:
    watch, done = Watch(), Counter[int]()

    def work(number: int, device: str) -> Piece[int]:
        def do(_turn: Turn) -> int:
            watch(device)
            done[number] += 1
            return number

        return Piece(str(number), device, do)

    outcomes = run_schedule([work(i, d) for i, d in enumerate(devices)], at_once=at_once)
    assert [o.value for o in outcomes] == list(range(len(devices)))
    assert all(count == 1 for count in done.values())
    assert watch.most_on_one <= 1
    assert watch.most_at_once <= at_once


def test_every_device_is_begun_before_one_is_waited_for() -> None:
    begun: list[str] = []
    begun_when_rest_began: list[int] = []

    def one(name: str) -> Piece[str]:
        def rest(_turn: Turn) -> str:
            begun_when_rest_began.append(len(begun))
            return name

        def begin(turn: Turn) -> str | Rest[str]:
            begun.append(name)
            return Rest(rest) if turn.others_wait else name

        return Piece(name, name, begin)

    names = [f"box-{i}" for i in range(10)]
    done, failed = sort_outcomes(run_schedule([one(n) for n in names], at_once=2))
    assert ([n for n, _ in done], failed) == (names, [])
    assert begun_when_rest_began and set(begun_when_rest_began) == {10}


def test_an_error_stops_nothing_else_and_is_told_with_its_name() -> None:
    def work(name: str) -> str:
        if name == "off":
            raise Unreachable("off: no route")
        return name.upper()

    done, failed = over_targets(["a", "off", "b"], work)
    assert done == [("a", "A"), ("b", "B")]
    assert [(name, str(e)) for name, e in failed] == [("off", "off: no route")]
    assert isinstance(failed[0][1], EdgevitError)


def test_a_defect_is_raised_and_nothing_new_is_begun() -> None:
    begun: list[str] = []

    def work(name: str) -> None:
        begun.append(name)
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match="a"):
        over_targets(["a", "b", "c"], work, at_once=1)
    assert begun == ["a"]


def test_ctrl_c_begins_nothing_new_and_finishes_what_is_under_way() -> None:
    begun: list[str] = []
    finished: list[str] = []
    told = threading.Event()

    def one(name: str) -> Piece[None]:
        def work(_turn: Turn) -> None:
            begun.append(name)
            os.kill(os.getpid(), signal.SIGINT)
            assert told.wait(120)
            finished.append(name)

        return Piece(name, name, work)

    with pytest.raises(KeyboardInterrupt):
        run_schedule([one("a"), one("b"), one("c")], at_once=1, on_stop=told.set)
    assert begun == finished == ["a"]


def test_two_names_of_one_address_are_one_device() -> None:
    a, b = (Target(name=n, host="192.0.2.1", user=u) for n, u in (("a", "pi"), ("b", "root")))
    assert device_of(a) == device_of(b)
    assert device_of(a) != device_of(a.model_copy(update={"port": 2222}))
    assert device_of(a) != device_of(a.model_copy(update={"jump": "gate"}))
    assert device_of(local_target()) == "local"
    watch = Watch()
    over_targets(["a", "b"], lambda name: watch("one"), device=lambda _name: "one")
    assert watch.most_on_one == 1


def test_ctrl_c_in_a_deployment_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way may take minutes more, and a command that says nothing then looks as if it hung."""
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    def work(target: Target, _progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(120)

    monkeypatch.setattr(connect, "say", say)
    with pytest.raises(KeyboardInterrupt):
        on_devices("deploying", [Target(name="a", host="a"), Target(name="b", host="b")], work, at_once=1)
    assert len(said) == 1 and "no other device is begun" in said[0]
