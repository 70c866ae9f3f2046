"""Kinds of boards. Adding one is one file here and one folder of recorded cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_agents.boards.generic import GenericBoard


def detect_board(root: Path) -> GenericBoard:
    """The readers that fit the board whose file tree hangs at ``root``, by its own model string."""
    from device_agents.boards.generic import GenericBoard
    from device_agents.boards.jetson import Jetson
    from device_agents.boards.raspberry_pi import RaspberryPi

    board = GenericBoard(root)
    model = board.model() or ""
    for kind in (RaspberryPi, Jetson):
        if kind.recognises(model):
            return kind(root)
    return board
