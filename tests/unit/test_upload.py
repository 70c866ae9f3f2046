"""What is sent of a file, and how fast: only what the device asked for in order, never above the rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents import wire
from edgevit.errors import BundleError, DeviceError
from edgevit.fleet.agent import Agent
from edgevit.fleet.upload import UPLOAD_CHUNK, Throttle, Upload, _read_ranges
from edgevit.progress import Quiet
from edgevit.transport.local import LocalTransport

BLOB = wire.Blob("a" * 64, 100)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1000), st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 3.0)), min_size=1, max_size=60))
def test_a_throttle_never_lets_more_through_than_its_rate_and_a_quarter_second_s_burst(
    mbit: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    throttle = Throttle(mbit, clock, clock.sleep)
    began, sent = clock.now, 0
    for share, idle in steps:
        size = max(1, int(share * throttle.step_bytes))
        throttle.take(size)
        sent += size
        assert sent <= mbit * 1e6 / 8 * (clock.now - began + 0.25) + 1.001, "more than the rate came through"
        clock.now += idle


def test_a_throttle_does_not_hold_back_what_its_rate_allows() -> None:
    clock = Clock()
    throttle, began = Throttle(8.0, clock, clock.sleep), clock.now
    for _ in range(100):
        throttle.take(100_000)
    assert clock.now - began == pytest.approx(10.0 - 0.25, abs=0.01)


def test_without_a_limit_nothing_waits() -> None:
    throttle = Throttle(None, sleep=lambda _: pytest.fail("it waited"))
    assert throttle.step_bytes == UPLOAD_CHUNK
    for _ in range(1000):
        throttle.take(UPLOAD_CHUNK)


def upload(path: Path) -> Upload:
    return Upload(Agent(LocalTransport("box")), "install", {}, {BLOB: path}, "x", Quiet())


@pytest.mark.parametrize(
    ("entry", "ranges"),
    [
        ({"offset": 0}, [(0, 100)]),
        ({"offset": 40}, [(40, 60)]),
        ({"offset": 100}, []),
        ({"ranges": []}, []),
        ({"ranges": [[0, 10], [10, 5], [99, 1]]}, [(0, 10), (10, 5), (99, 1)]),
    ],
)
def test_what_the_device_may_ask_for(tmp_path: Path, entry: dict[str, Any], ranges: list[tuple[int, int]]) -> None:
    need = {"blobs": [{"sha256": BLOB.sha256, **entry}]}
    assert upload(tmp_path)._check_need(need) == [(BLOB, ranges)]


@pytest.mark.parametrize(
    "entry",
    [
        {}, {"offset": -1}, {"offset": 101}, {"offset": True}, {"offset": 1.0}, {"offset": "0"}, {"offset": 0, "ranges": []},
        {"ranges": [[0, 101]]}, {"ranges": [[100, 1]]}, {"ranges": [[0, 0]]}, {"ranges": [[-1, 2]]},
        {"ranges": [[5, 5], [0, 5]]}, {"ranges": [[0, 10], [9, 1]]}, {"ranges": [[0, 10], [0, 10]]},
        {"ranges": [[0]]}, {"ranges": [0]}, {"ranges": [[0, True]]}, {"ranges": [["0", 1]]}, {"ranges": {"0": 1}},
        {"ranges": [[0, 2**70]]},
    ],
)  # fmt: skip
def test_a_device_cannot_ask_for_anything_else(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match="none of what is to be sent"):
        upload(tmp_path)._check_need({"blobs": [{"sha256": BLOB.sha256, **entry}]})


@pytest.mark.parametrize("blobs", [[{"sha256": "b" * 64, "offset": 0}], [{"sha256": BLOB.sha256, "offset": 0}] * 2, [5], [[]]])
def test_nor_for_another_file_nor_for_one_twice(tmp_path: Path, blobs: list[Any]) -> None:
    with pytest.raises(DeviceError, match="none of what is to be sent"):
        upload(tmp_path)._check_need({"blobs": blobs})


def test_a_bundle_that_vanishes_while_it_is_sent_is_its_own_error_not_the_device_s(tmp_path: Path) -> None:
    """Nor a defect, which would end what is done on the other devices of the fleet."""
    path = tmp_path / "blob"
    with pytest.raises(BundleError, match="blob cannot be read any more: No such file"):
        list(_read_ranges(path, [(0, 10)], 4))
    path.write_bytes(b"1234567")
    with pytest.raises(BundleError, match="became shorter"):
        list(_read_ranges(path, [(0, 10)], 4))
    path.write_bytes(b"1234567890")
    assert b"".join(_read_ranges(path, [(0, 3), (8, 2)], 2)) == b"12390"
