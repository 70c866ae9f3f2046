"""Fixtures for every test: an empty home, so that nothing of the person who runs the tests is read or changed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty EDGEVIT_HOME and HOME."""
    place = tmp_path / "edgevit-home"
    monkeypatch.setenv("EDGEVIT_HOME", str(place))
    monkeypatch.delenv("EDGEVIT_DB", raising=False)
    monkeypatch.delenv("EDGEVIT_FLEET", raising=False)
    (tmp_path / "user-home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user-home"))
    return place
