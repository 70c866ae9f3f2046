"""The agent's own Python environments on disk: which is in use, what was installed into it, changing to another at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, List, Optional, Tuple

from device_agents import wire
from device_agents.errors import Refused, printable, refuse_os_error
from device_agents.root import sync_folder, temp_name
from device_agents.store import Store

MARK = "edgevit.json"
"""Written last: an environment without it was never finished."""


def interpreter() -> str:
    """The program that makes environments: they work only with this very one, whose own updates keep its name."""
    return os.path.realpath(sys.executable)


def version_text() -> str:
    return "{}.{}.{}".format(*sys.version_info[:3])


def environment_of(request: wire.EnvironmentRequest) -> wire.Environment:
    """What an environment made for ``request`` by this Python is called afterwards."""
    return wire.Environment(request.requirements, request.system_site, version_text(), request.wheels)


def make_mark(environment: wire.Environment) -> bytes:
    return json.dumps({"interpreter": interpreter(), "environment": wire.encode(environment)}).encode("utf-8")


def read_mark(store: Store, folder: Path) -> Tuple[Optional[wire.Environment], str]:
    """(what was installed into the environment in ``folder``, or None with the reason). Another Python's counts as none."""
    mark = folder / MARK
    try:
        data = store.read(mark, wire.MAX_JOB_BYTES)
        if data is None:
            return None, "provisioning made none, or did not finish"
        document = wire.parse_json(data, MARK, wire.MAX_JOB_BYTES)
        if document["interpreter"] != interpreter():
            made_by = printable(str(document["interpreter"]))[:200]
            return None, "it was made by {}, this is {}".format(made_by, interpreter())
        environment = wire.decode(wire.Environment, document["environment"], MARK)
    except (wire.WireError, Refused, KeyError, TypeError) as e:
        return None, "{} cannot be read: {}".format(mark, e)
    if environment.python.split(".")[:2] != version_text().split(".")[:2]:
        return None, "it was made for Python {}, this is {}".format(environment.python, version_text())
    if not python_of(folder).exists():
        return None, "{} is gone".format(python_of(folder))
    return environment, ""


def read_environment(store: Store) -> Tuple[Optional[wire.Environment], str]:
    """The environment in use, or None with the reason."""
    return read_mark(store, store.venv_folder)


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def find_finished(store: Store, environment: wire.Environment) -> Optional[Path]:
    """An environment that is there already with exactly these wheels, whether in use or made just before a kill."""
    for folder in list_environments(store):
        found, _ = read_mark(store, folder)
        if found is not None and same_environment(found, environment):
            return folder
    return None


def same_environment(one: wire.Environment, other: wire.Environment) -> bool:
    def what_counts(e: wire.Environment) -> Any:
        return e.requirements, e.system_site, e.python.split(".")[:2], sorted((w.name, w.sha256) for w in e.wheels)

    return bool(what_counts(one) == what_counts(other))


def list_environments(store: Store) -> List[Path]:
    try:
        names = sorted(os.listdir(str(store.environments_folder)))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise refuse_os_error(e, "listing {}".format(store.environments_folder)) from e
    return [store.environments_folder / name for name in names]


def used_environment(store: Store) -> Optional[Path]:
    """Where the link leads; None where there is none, or where a folder stands in its place."""
    try:
        return store.environments_folder / os.path.basename(os.readlink(str(store.venv_folder)))
    except OSError:
        return None


def use_environment(store: Store, folder: Path) -> None:
    """Make ``folder`` the environment in use, by one rename."""
    link, old = store.root / temp_name(), store.root / temp_name()
    try:
        os.symlink(os.path.join(store.environments_folder.name, folder.name), str(link))
        if store.venv_folder.is_dir() and not store.venv_folder.is_symlink():
            os.rename(str(store.venv_folder), str(old))  # an older agent's: a link cannot replace a folder
        os.rename(str(link), str(store.venv_folder))
        sync_folder(store.root)
        if old.exists():
            shutil.rmtree(str(old))
    except OSError as e:
        raise refuse_os_error(e, "changing to {}".format(folder)) from e


def copy_environment(source: Path, target: Path) -> None:
    """A copy that shares its files with ``source`` where the file system can, without its mark.

    What names its own place (the scripts, ``pyvenv.cfg``) is written anew; nothing installed is ever changed in place."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    try:
        shutil.copytree(str(source), str(target), symlinks=True, ignore=shutil.ignore_patterns(MARK), copy_function=link)
        old, new = (os.fsencode(str(p)) for p in (source, target))
        for path in [target / "pyvenv.cfg", *sorted((target / "bin").iterdir())]:
            if path.is_symlink() or not path.is_file():
                continue
            data, mode = path.read_bytes(), path.stat().st_mode
            if old in data:
                path.unlink()
                path.write_bytes(data.replace(old, new))
                path.chmod(mode & 0o777)
    except OSError as e:  # shutil.Error is one too
        raise refuse_os_error(e, "copying {}".format(source)) from e
