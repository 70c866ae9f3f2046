"""Runs whose figures contradict themselves never come into the store: they would end whatever shows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from device_agents import wire
from device_agents.wire import Accuracy, Run
from edgevit.errors import DeviceRefused
from edgevit.fleet.agent import Agent
from edgevit.results.sound import verify_sound
from edgevit.transport.local import LocalTransport
from tests.support.judged import mixed
from tests.support.runs import measurement, run


def timed(*samples_ns: int) -> Run:
    m = measurement(processes=1)
    return run(measurements=(dataclasses.replace(m, series=(dataclasses.replace(m.series[0], samples_ns=samples_ns),)),))


def scored(images: int, correct: int, predictions: tuple[int, ...], labels: tuple[int, ...]) -> Run:
    return run(measurements=(measurement(accuracy=Accuracy(images, correct, predictions, labels, "four", False)),))


class Told(Agent):
    """An agent that answers with ``told``."""

    told: Run

    def _call(self, command: str, *_: Any, **__: Any) -> Any:
        return wire.encode(self.told)


def follow(told: Run) -> Run:
    agent = Told(LocalTransport("local"))
    agent.told = told
    return agent.follow(told.job.run_id)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (timed(10**7, 0, 10**7), r"run.measurements\[0\].series\[0\].samples_ns: got 0 ns"),
        (timed(-5), "got -5 ns"),
        (scored(4, 5, (0, 1, 0, 1), (0, 1, 0, 1)), "got 5 images as right, its predictions have 4"),
        (scored(4, 4, (0, 1), (0, 1, 0, 1)), "4 images, 2 predictions and 4 labels"),
        (scored(3, 3, (0, 1, 0, 1), (0, 1, 0, 1)), "3 images, 4 predictions and 4 labels"),
        (scored(4, 4, (0, 1, 0, -1), (0, 1, 0, -1)), "a class below 0"),
    ],
)
def test_what_contradicts_itself_is_refused_as_a_damaged_result(told: Run, said: str) -> None:
    with pytest.raises(DeviceRefused, match=said) as refused:
        follow(told)
    assert refused.value.code == "run-damaged", "it would hold up the results beside it"


def test_whatever_was_measured_comes_home() -> None:
    for one in (*mixed(), timed(), scored(4, 2, (0, 0, 0, 0), (0, 1, 0, 1))):
        verify_sound(one)
        assert follow(one) == one
