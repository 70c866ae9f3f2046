"""Where edgevit keeps things on the operator's machine: one directory under EDGEVIT_HOME, else the platform's own folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _place(platform_dir: str, name: str) -> Path:
    home = os.environ.get("EDGEVIT_HOME")
    if home:
        return Path(home).expanduser().absolute() / name
    import platformdirs

    chosen = getattr(platformdirs, platform_dir)("edgevit", appauthor=False)
    return Path(chosen) if platform_dir == "user_cache_dir" else Path(chosen) / name


def config_dir() -> Path:
    """Signing key, signers, host keys, fleet file."""
    return _place("user_config_dir", "config")


def cache_dir() -> Path:
    """Builds by digest; safe to delete."""
    return _place("user_cache_dir", "cache")


def data_dir() -> Path:
    """Results and the ``local`` target's agent."""
    return _place("user_data_dir", "data")


_named: dict[str, list[str]] = {"EDGEVIT_DB": [], "EDGEVIT_FLEET": []}
"""What the command lines that are being run name in place of these variables, the innermost last."""


@contextmanager
def using(variable: str, value: str) -> Iterator[None]:
    """Within the block ``value`` stands for EDGEVIT_DB or EDGEVIT_FLEET, whatever the environment says."""
    _named[variable].append(value)
    try:
        yield
    finally:
        _named[variable].pop()


def _given(variable: str) -> str | None:
    named = _named[variable]
    return named[-1] if named else os.environ.get(variable)


def db_url() -> str:
    """``--db``, else EDGEVIT_DB (each a path or an SQLAlchemy URL), else a SQLite file in :func:`data_dir`."""
    given = _given("EDGEVIT_DB")
    return as_db_url(given) if given else f"sqlite:///{data_dir() / 'results.sqlite'}"


def as_db_url(given: str) -> str:
    """A path as a SQLite URL; a URL as it is."""
    return given if "://" in given else f"sqlite:///{Path(given).expanduser().absolute()}"


def shown_url(url: str) -> str:
    """A store's URL as it may be shown and kept: without its password, wherever in it that stands."""
    head, at, tail = url.rpartition("@")
    scheme, slashes, user = head.partition("://")
    if at and slashes and ":" in user:
        head = f"{scheme}://{user.partition(':')[0]}:***"
    elif at and not slashes and ":" in head:
        head = f"{head.partition(':')[0]}:***"
    return re.sub(r"(?i)([?&](?:ssl)?pass(?:word|wd)?=)[^&#]*", r"\1***", head + at + tail)


def fleet_path() -> Path:
    """``--fleet``, else EDGEVIT_FLEET, else ``fleet.yaml`` in :func:`config_dir`."""
    given = _given("EDGEVIT_FLEET")
    return Path(given).expanduser().absolute() if given else config_dir() / "fleet.yaml"


def audit_path() -> Path:
    """The log of what was done to targets from here: JSON lines, only ever added to."""
    return data_dir() / "audit.jsonl"


def outbox_dir() -> Path:
    """Measurements that wait here for a device that is off."""
    return data_dir() / "outbox"


def local_root() -> Path:
    """The root of the agent behind the ``local`` target."""
    return data_dir() / "local-agent"
