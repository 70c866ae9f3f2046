"""Boards as data: a case's files and programs laid out as a tree that the readers take for a device's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from device_agents.boards.generic import GenericBoard

CASES = Path(__file__).resolve().parent.parent / "cases" / "boards"


def board_cases() -> list[str]:
    return sorted(folder.name for folder in CASES.iterdir() if folder.is_dir())


def expected_of(case: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CASES / case / "expected.json").read_text("utf-8"))
    return document


def lay_out_case(case: str, root: Path, **changes: str) -> Path:
    """The tree of a case under ``root``. ``changes``: other contents for files whose path ends so, ``_`` standing for ``/``."""
    recorded = json.loads((CASES / case / "recorded.json").read_text("utf-8"))
    lay_out(root, recorded["files"])
    for program, answers in recorded["commands"].items():
        lay_out_program(root / program, answers)
    for name, text in changes.items():
        (found,) = [path for path in root.rglob(name) if path.is_file()]
        found.write_text(text)
    return root


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def lay_out_program(path: Path, answers: dict[str, list[str]]) -> None:
    """A program that answers each question with its lines, and leaves a byte in ``PATH.asked`` each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["#!/bin/sh", f"printf x >> {shlex.quote(str(path) + '.asked')}", 'case "$*" in']
    for question, answer in answers.items():
        told = shlex.quote("\n".join(answer))
        lines.append(f"{shlex.quote(question)}) echo {told} ;;")
    path.write_text("\n".join([*lines, "*) exit 1 ;;", "esac", ""]))
    path.chmod(0o755)


def describe(board: GenericBoard) -> dict[str, Any]:
    """Everything a board's readers tell, as plain JSON values."""
    rails = board.rails_mw()
    scope = board.power_scope()
    total = board.total_mw(rails)
    return {
        "kind": board.name,
        "model": board.model(),
        "cpu": board.cpu()[0],
        "release": board.jetpack(),
        "temperature_c": board.temperature_c(),
        "clusters_mhz": dict(board.clusters_mhz()),
        "frequency_mhz": board.frequency_mhz(),
        "governor": board.governor(),
        "throttle": None if (limits := board.throttle()) is None else list(limits),
        "gpu": list(board.gpu()),
        "rails_mw": {name: round(mw, 3) for name, mw in rails},
        "power_mw": None if total is None else round(total, 3),
        "power_scope": None if scope is None else [scope.scope, scope.covers],
        "asks_programs": sorted(board.asks_programs),
        "sensors": list(board.sensors()),
        "absent": board.absent(),
    }
