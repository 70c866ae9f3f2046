"""Bytes on their way to a device, and what its agent says meanwhile, as Progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from device_agents import wire
from edgevit.errors import BundleError
from edgevit.fleet.conversation import Conversation, Message
from edgevit.progress import Progress, Quiet
from edgevit.transport.base import Channel

if TYPE_CHECKING:
    from edgevit.fleet.agent import Agent

UPLOAD_CHUNK = 1 << 20

STAGE_WORDS = {
    "series": "measure",
    "accuracy": "count top-1",
    "waiting": "wait",
    "receive": "receive",
    "reuse": "copy what is there",
}


class Stages:
    """The agent's ``progress`` lines → Progress: one key a stage."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix
        self._stage: tuple[str, float | None] = ("", None)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stage[0]:
            self._progress.finish(self._stage[0], self._stage[0])

    def __call__(self, message: Message) -> None:
        if message.get("type") != "progress":
            return
        stage, text = str(message.get("stage", ""))[:60], str(message.get("text", ""))[:200]
        total, done, unit = message.get("total"), message.get("done"), str(message.get("unit", ""))[:20]
        known = float(total) if isinstance(total, (int, float)) and total > 0 and unit else None
        what = f"{self._prefix}{STAGE_WORDS.get(stage, stage)}"
        if (what, known) != self._stage:
            if self._stage[0] not in ("", what):
                self._progress.finish(self._stage[0], self._stage[0])
            self._progress.start(what, what, known, unit)
            self._stage = (what, known)
        shown = f"{what}: {text}" if text else what
        self._progress.advance(what, float(done) if isinstance(done, (int, float)) else 0.0, shown)


Range = tuple[int, int]
"""Offset and length in bytes."""


class Upload:
    """A command that takes files: its request, then of each blob the bytes that the device asks for, at most at
    ``agent.max_rate_mbit``. The device may ask several times. ``sent`` holds the digests of those of which a byte was sent."""

    def __init__(
        self, agent: Agent, command: str, request: Message, files: Mapping[wire.Blob, Path], title: str, progress: Progress
    ) -> None:
        self._agent, self._command, self._request = agent, command, request
        self._files, self._title, self._progress = files, title, progress
        self._throttle = Throttle(agent.max_rate_mbit)
        self.sent: tuple[str, ...] = ()

    def run(self) -> Message:
        """The command's result."""
        with Stages(self._progress, f"{self._agent.name}: ") as stages:
            self._stages = stages
            return self._agent.converse(self._command, (), self._send, self._on_message)

    def _on_message(self, message: Message) -> None:
        # What arrived is shown as it is sent; of the device's own stages only the others say something new.
        if message.get("stage") != "receive":
            self._stages(message)

    def _send(self, channel: Channel, conversation: Conversation) -> None:
        self.sent = ()
        channel.write(json.dumps(self._request, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n")
        last = False
        while not last:
            need = conversation.read_until("need")
            if need is None:
                return
            last = self._agent.field(need, "last", bool)
            # The chunk index, which the device asks for first, is not worth a line of its own.
            self._send_wanted(channel, self._check_need(need), self._progress if last else Quiet())
        channel.close_input()

    def _send_wanted(self, channel: Channel, wanted: list[tuple[wire.Blob, list[Range]]], progress: Progress) -> None:
        total = sum(length for _, ranges in wanted for _, length in ranges)
        there = sum(blob.size for blob, _ in wanted) - total
        saved = f" ({there / 1e6:.1f} MB of it are there)" if there else ""
        key = f"{self._agent.name}: upload"
        progress.start(key, f"{self._agent.name}: sending {self._title}{saved}", float(total), "bytes")
        done, said = 0, time.monotonic()
        for blob, ranges in wanted:
            if ranges:
                self.sent += (blob.sha256,)
            for data in _read_ranges(self._files[blob], ranges, self._throttle.step_bytes):
                self._throttle.take(len(data))
                channel.write(data)
                done += len(data)
                if time.monotonic() - said > 0.1:
                    said = time.monotonic()
                    progress.advance(key, float(done))
        progress.finish(key)

    def _check_need(self, need: Message) -> list[tuple[wire.Blob, list[Range]]]:
        """Only these files are ever sent, whatever the device asks for, and no byte of them twice in one answer."""
        known = {blob.sha256: blob for blob in self._files}
        wanted = []
        for entry in self._agent.field(need, "blobs", list):
            blob = known.pop(str(entry.get("sha256")), None) if isinstance(entry, dict) else None
            ranges = None if blob is None else _parse_ranges(entry, blob.size)
            if blob is None or ranges is None:
                raise self._agent.defect(f"it asked for {str(entry)[:200]}, which is none of what is to be sent")
            wanted.append((blob, ranges))
        return wanted


def _parse_ranges(entry: Message, size: int) -> list[Range] | None:
    """The ranges of a blob that an entry of ``need`` asks for: all from ``offset`` on, or ``ranges``, rising; else None."""
    offset, ranges = entry.get("offset"), entry.get("ranges")
    if ranges is None and _is_size(offset) and offset <= size:
        return [(offset, size - offset)] if offset < size else []
    if offset is not None or not isinstance(ranges, list):
        return None
    found, end = [], 0
    for one in ranges:
        if not isinstance(one, list) or len(one) != 2 or not _is_size(one[0]) or not _is_size(one[1]):
            return None
        if one[0] < end or one[1] == 0 or one[0] + one[1] > size:
            return None
        end = one[0] + one[1]
        found.append((one[0], one[1]))
    return found


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_ranges(path: Path, ranges: Sequence[Range], step: int) -> Iterator[bytes]:
    """BundleError where the file vanished or changed since it was looked at."""
    try:
        with path.open("rb") as f:
            for offset, left in ranges:
                f.seek(offset)
                while left:
                    data = f.read(min(step, left))
                    if not data:
                        raise BundleError(f"{path} became shorter while it was sent", hint="edgevit verify BUNDLE")
                    left -= len(data)
                    yield data
    except OSError as e:
        raise BundleError(f"{path} cannot be read any more: {e.strerror or e}", hint="edgevit verify BUNDLE") from e


class Throttle:
    """A token bucket (Turner 1986): at most ``mbit`` · 10⁶ bits a second on average, a quarter of a second's worth at once;
    None: no limit. It counts the bytes of blobs; what SSH and TCP add comes on top, about 2 %."""

    def __init__(
        self,
        mbit: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = None if mbit is None else mbit * 1e6 / 8
        self._clock, self._sleep = clock, sleep
        self._burst = 0.0 if self._rate is None else max(1.0, self._rate / 4)
        self._left, self._at = self._burst, clock()

    @property
    def step_bytes(self) -> int:
        """How much to send at a time."""
        return UPLOAD_CHUNK if self._rate is None else max(1, min(UPLOAD_CHUNK, int(self._burst)))

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may go."""
        if self._rate is None:
            return
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - size
        self._at = now
        if self._left < 0:
            self._sleep(-self._left / self._rate)
