"""One command's conversation with the agent on a device: its lines read strictly, its refusals mapped to our errors, and what
else can end it told apart: no Python there, no agent, a lost link, a defect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device_agents import wire
from edgevit.agentpack import EXIT_NO_AGENT, EXIT_OLD_PYTHON
from edgevit.errors import DeviceError, LostLink, NotProvisioned
from edgevit.fleet.refusals import map_refusal
from edgevit.transport.base import Channel

SILENCE_S = 60.0
"""The agent says that it is alive every 2 s; a slow card may hold it up for longer than that, but not for this long."""

END_S = 30.0
"""How long a program may take to end after its last word."""

EXIT_NOT_FOUND = (126, 127)
"""What a shell says of a program that it cannot start, or cannot find."""

JETPACK4 = "sudo apt install python3.8 python3.8-venv (JetPack 4), then edgevit target add … --python python3.8"

Message = dict[str, Any]
OnMessage = Callable[[Message], None]


class Conversation:
    """One command's lines, from its request to its result."""

    def __init__(self, name: str, command: str, channel: Channel, on_message: OnMessage | None, limit: int) -> None:
        self._name, self._command = name, command
        self._channel, self._on_message = channel, on_message
        # The value stands inside one more object.
        self._limit = limit + 4096
        self._raw = b""

    def run(self, send: Callable[[Channel, Conversation], None]) -> Message | None:
        """The command's value; None where the launcher found no agent to start. ``send`` writes the request, and may read.

        Raises what the device refuses (:func:`edgevit.fleet.refusals.map_refusal`), NotProvisioned without a Python that could
        start it, LostLink, and DeviceError where the agent does not speak as one does.
        """
        lost: LostLink | None = None
        last: Message | None = None
        try:
            send(self._channel, self)
        except LostLink as e:
            # An agent that refuses stops reading; what it said is worth more than that it stopped.
            lost = e
        except Ended as e:
            last = e.message
        if last is None:
            last = self.read_until("result", "refusal")
        if self._raw and self._channel.read_line(SILENCE_S):
            raise self._defect(f"something printed {self._raw!r} before the agent spoke (a shell's start-up file?)")
        status = self._channel.wait(END_S)
        if last is None:
            if status == EXIT_NO_AGENT and not self._raw:
                return None
            check_start(self._name, status, self._raw, self._channel.error_text())
            if lost is not None and status == 0:
                raise lost
            printed = f"; before it, something printed {self._raw!r} (a shell's start-up file?)" if self._raw else ""
            raise self._defect(f"it ended with status {status} and no result{printed}")
        if last["type"] == "refusal":
            raise map_refusal(self._name, self._refusal(last))
        if status != 0:
            raise self._defect(f"it gave a result but ended with status {status}")
        value = last.get("value")
        if not isinstance(value, dict):
            raise self._defect("its result is not an object")
        return value

    def read_until(self, *types: str) -> Message | None:
        """The next message of one of ``types``, others handed on; None at the end of output."""
        while True:
            line = self._channel.read_line(SILENCE_S)
            if not line:
                return None
            message = self._parse(line)
            if message is None:
                return None
            if message["type"] in types:
                return message
            if message["type"] in ("result", "refusal"):
                raise Ended(message)
            if self._on_message is not None and message["type"] != "alive":
                self._on_message(message)

    def _parse(self, line: bytes) -> Message | None:
        try:
            message = wire.parse_json(line, "message", self._limit)
        except wire.WireError as e:
            if not self._raw and len(line) < 100:
                # A launcher under an old Python prints its version; the exit status will tell.
                self._raw = line
                return None
            raise self._defect(f"it wrote a line that is no message: {e}") from e
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            if not self._raw and len(line) < 100:
                self._raw = line
                return None
            raise self._defect(f"it wrote a line that is no message: {line[:200]!r}")
        return message

    def _refusal(self, message: Message) -> wire.Refusal:
        try:
            return wire.decode(wire.Refusal, message.get("refusal"), "refusal")
        except wire.WireError as e:
            raise self._defect(f"its refusal cannot be read: {e}") from e

    def _defect(self, message: str) -> DeviceError:
        tail = self._channel.error_text().strip()[-2000:]
        said = f"; it wrote to standard error:\n{tail}" if tail else ""
        return DeviceError(
            f"{self._name}: the agent is defective ({self._command}): {message}{said}",
            hint=f"edgevit target probe {self._name}",
        )


class Ended(Exception):
    """The last line came while something else was waited for."""

    def __init__(self, message: Message) -> None:
        super().__init__("the conversation ended")
        self.message = message


def check_start(name: str, status: int, said: bytes, errors: str) -> None:
    """Raise NotProvisioned where no Python, or one that is too old, was there to start the agent; else return."""
    if status == EXIT_OLD_PYTHON:
        version = said.decode("ascii", "replace").strip()[:20]
        raise NotProvisioned(f"{name}: its Python is {version or 'too old'}; the agent needs 3.8 or newer", hint=JETPACK4)
    if status in EXIT_NOT_FOUND:
        detail = errors.strip()[-300:] or f"exit status {status}"
        raise NotProvisioned(
            f"{name}: no Python could be started there: {detail}", hint="on the device: sudo apt install python3"
        )
