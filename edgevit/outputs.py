"""Files and folders a person asked for: looked at before work starts, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgevit.errors import UsageError

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a text begins with that spreadsheets take for a formula (OWASP, "CSV Injection")."""


def verify_writable_file(path: Path) -> None:
    """Raises :class:`UsageError` where :func:`write_whole` could not put a file at ``path``."""
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder", hint=f"name a file in it, such as {path / 'NAME'}")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "is not there"
        raise UsageError(f"{path} cannot be written: {folder} {what}", hint=f"mkdir -p {folder}")
    _try_in(folder, path)


def verify_writable_folder(path: Path) -> None:
    """Raises :class:`UsageError` where no folder can be made at ``path``, or nothing written into the one that is there."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{path} cannot be written: {there} is not a folder", hint="give another -o DIR")
    _try_in(there, path)


def _try_in(folder: Path, path: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".edgevit-")
        os.close(handle)
        Path(name).unlink()
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {folder}: {e.strerror or e}", hint=f"ls -ld {folder}") from e


def write_whole(path: Path, text: str) -> None:
    """``text`` becomes the file ``path`` in one rename. Raises :class:`UsageError` where it cannot be written."""
    with writing_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def as_cell(value: Any) -> Any:
    """``value`` for a CSV file: a text that a spreadsheet would carry out as a formula has an apostrophe before it. Names of
    boards and reasons of failures come from devices."""
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULA else value


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which becomes ``path`` in one rename when the block ends, and goes where it fails.

    Raises :class:`UsageError` where it cannot be written."""
    verify_writable_file(path)
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name[:100]}.")
        os.close(handle)
        part = Path(name)
        yield part
        part.chmod(0o644)
        part.replace(path)
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror or e}", hint=f"df -h {path.absolute().parent}") from e
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
