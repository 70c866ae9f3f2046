"""What a command answered, and what it left active on the ``local`` target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgevit import places


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    def refused(self, code: int, message: str, hint: str) -> None:
        """Exit ``code``, ``message`` in the error, ``hint`` in the line of the next command, and no traceback."""
        assert self.code == code, self.err
        error = next((line for line in self.err.splitlines() if line.startswith("error:")), "no error line")
        following = next((line for line in self.err.splitlines() if line.startswith("next:")), "no line with the next command")
        assert message in error, self.err
        assert hint in following, self.err
        assert "Traceback" not in self.err and "\r" not in self.err and "�" not in self.err


Cli = Callable[..., Said]


def active() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((places.local_root() / "active.json").read_text())["active"]
    return document
