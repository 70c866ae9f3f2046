"""Whatever paramiko raises becomes an error of ours."""

from __future__ import annotations

import importlib
import pkgutil
import socket

import paramiko
import pytest

from edgevit.errors import DeviceError, EdgevitError, LostLink, Unreachable, UsageError
from edgevit.transport.ssh_errors import MAPPED, map_error

INTERNAL = {"NeedRekeyException", "NotFoundError"}
"""Raised and caught inside paramiko alone, or by key lookups that edgevit does not use."""


def paramiko_exceptions() -> list[type[BaseException]]:
    found: dict[str, type[BaseException]] = {}
    for info in pkgutil.iter_modules(paramiko.__path__):
        if info.name in ("_winapi", "win_pageant", "win_openssh"):
            continue
        module = importlib.import_module(f"paramiko.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__.startswith("paramiko"):
                found[value.__name__] = value
    return [found[name] for name in sorted(set(found) - INTERNAL)]


def test_there_are_exceptions_to_map() -> None:
    assert len(paramiko_exceptions()) >= 15


@pytest.mark.parametrize("kind", paramiko_exceptions(), ids=lambda k: k.__name__)
def test_every_exception_of_paramiko_is_in_the_table_itself(kind: type[BaseException]) -> None:
    """A new class must be thought about, not fall through to its base."""
    assert kind in [foreign for foreign, _, _ in MAPPED], (
        f"map {kind.__module__}.{kind.__name__} in edgevit/transport/ssh_errors.py"
    )


def test_no_entry_hides_one_below_it() -> None:
    for i, (above, _, _) in enumerate(MAPPED):
        for below, _, _ in MAPPED[i + 1 :]:
            assert not issubclass(below, above) or below is above, (
                f"{below.__name__} is never reached: {above.__name__} comes first"
            )


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (socket.gaierror(-2, "unknown"), Unreachable, LostLink),
        (ConnectionRefusedError(111, "refused"), Unreachable, LostLink),
        (TimeoutError("timed out"), Unreachable, LostLink),
        (EOFError(), Unreachable, LostLink),
        (paramiko.SSHException("x"), Unreachable, LostLink),
        (paramiko.ChannelException(1, "prohibited"), Unreachable, DeviceError),
        (ValueError("a damaged packet"), Unreachable, LostLink),
    ],
)
def test_stages_are_told_apart(error: BaseException, before: type[EdgevitError], after: type[EdgevitError]) -> None:
    assert type(map_error(error, "box", "doing", connected=False)) is before
    assert type(map_error(error, "box", "doing", connected=True)) is after
    assert "box" in str(map_error(error, "box", "doing", connected=True))


def test_ours_stays_ours() -> None:
    ours = UsageError("x")
    assert map_error(ours, "box", "doing", connected=True) is ours
