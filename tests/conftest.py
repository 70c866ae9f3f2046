"""Fixtures for every test: an empty home, so that nothing of the person who runs the tests is read or changed.

Two processes run the tests (pytest-xdist, ``--dist loadgroup``). Whatever measures on this machine waits for the one device
lock that it has, so those tests stay together, in one process and first; of the others each file stays together.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.agent_bundle import Signer, TinyBundle, make_bundle, make_signer

TESTS = Path(__file__).resolve().parent
ON_A_DEVICE = ("loopback", "sshd", "fleet", "pythons")
"""Folders of tests that start agents."""

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder, *_ = item.path.relative_to(TESTS).parts
        item.add_marker(pytest.mark.xdist_group("device" if folder in ON_A_DEVICE else str(item.path)))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in ON_A_DEVICE)


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


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return make_signer(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def bundle(signer: Signer) -> TinyBundle:
    return make_bundle(signer)
