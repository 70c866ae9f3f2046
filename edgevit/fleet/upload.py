"""Bytes on their way to a device, and what its agent says meanwhile, as Progress."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents import wire
from edgevit.errors import DeviceError
from edgevit.progress import Progress
from edgevit.transport.base import Channel

if TYPE_CHECKING:
    from edgevit.fleet.agent import Agent, Conversation

UPLOAD_CHUNK = 1 << 20
Message = dict[str, Any]

STAGE_WORDS = {"series": "measure", "accuracy": "count top-1", "waiting": "wait", "receive": "receive"}


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


class Upload:
    """A command that takes files: its request, then the raw bytes of each blob that the device asks for, from the offset it
    names. ``sent`` holds the digests of the blobs sent."""

    def __init__(
        self, agent: Agent, command: str, request: Message, files: Mapping[wire.Blob, Path], title: str, progress: Progress
    ) -> None:
        self._agent, self._command, self._request = agent, command, request
        self._files, self._title, self._progress = files, title, progress
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
        need = conversation.read_until("need")
        if need is None:
            return
        wanted = self._check_need(need)
        total = sum(blob.size - offset for blob, offset in wanted)
        key = f"{self._agent.name}: upload"
        self._progress.start(key, f"{self._agent.name}: sending {self._title}", float(total), "bytes")
        done, said = 0, time.monotonic()
        for blob, offset in wanted:
            self.sent += (blob.sha256,)
            with self._files[blob].open("rb") as f:
                f.seek(offset)
                left = blob.size - offset
                while left:
                    chunk = f.read(min(UPLOAD_CHUNK, left))
                    if not chunk:
                        raise DeviceError(f"{f.name} became shorter while it was sent", hint="edgevit verify BUNDLE")
                    channel.write(chunk)
                    left -= len(chunk)
                    done += len(chunk)
                    if time.monotonic() - said > 0.1:
                        said = time.monotonic()
                        self._progress.advance(key, float(done))
        channel.close_input()
        self._progress.finish(key)

    def _check_need(self, need: Message) -> list[tuple[wire.Blob, int]]:
        """Only these files are ever sent, whatever the device asks for."""
        known = {blob.sha256: blob for blob in self._files}
        wanted = []
        for entry in self._agent._field(need, "blobs", list):
            sha256, offset = (entry.get("sha256"), entry.get("offset")) if isinstance(entry, dict) else (None, None)
            blob = known.pop(str(sha256), None)
            if blob is None or not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset <= blob.size:
                raise self._agent._defect(f"it asked for {str(entry)[:200]}, which is none of what is to be sent")
            wanted.append((blob, offset))
        return wanted
