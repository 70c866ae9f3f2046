"""A blob's ``.part``: the file that it grows in until its SHA-256 is right."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator, List, Tuple

from device_agents import wire
from device_agents.errors import Refused, refuse_os_error
from device_agents.root import open_with_mode
from device_agents.store import Store, hash_descriptor

_WRITE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def part_size(store: Store, blob: wire.Blob) -> int:
    """The length of a part that is a regular file, else 0."""
    try:
        fd = store.open_regular(store.part_path(blob.sha256))
    except (FileNotFoundError, Refused):
        return 0
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def allocated(store: Store, blob: wire.Blob) -> int:
    """Bytes of the disk that the part has taken already."""
    try:
        return min(store.part_path(blob.sha256).lstat().st_blocks * 512, blob.size)
    except OSError:
        return 0


def lacking_rest(store: Store, blob: wire.Blob) -> List[Tuple[int, int]]:
    """What a prefix lacks. A part that is no regular file, or longer than the blob, goes; so does one of full length that is
    not the blob: one that was put together from chunks, with holes."""
    part = store.part_path(blob.sha256)
    try:
        fd = store.open_regular(part)
    except FileNotFoundError:
        return [(0, blob.size)]
    except Refused:
        discard(part)
        return [(0, blob.size)]
    try:
        size = os.fstat(fd).st_size
        whole = size == blob.size and hash_descriptor(fd) == blob.sha256
    except OSError as e:
        raise refuse_os_error(e, "reading {}".format(part)) from e
    finally:
        os.close(fd)
    if whole:
        return []
    if size >= blob.size:
        discard(part)
        return [(0, blob.size)]
    return [(size, blob.size - size)]


@contextlib.contextmanager
def open_part(store: Store, blob: wire.Blob) -> Iterator[int]:
    """A descriptor of the blob's part; whatever else lies in its place goes first."""
    part = store.part_path(blob.sha256)
    if os.path.lexists(str(part)) and (part.is_symlink() or not part.is_file()):
        discard(part)
    try:
        fd = open_with_mode(part, _WRITE_FLAGS, store.file_mode)
    except OSError as e:
        raise refuse_os_error(e, "opening {}".format(part)) from e
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def refusing(blob: wire.Blob) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise refuse_os_error(e, "storing blob {}".format(blob.sha256)) from e


def discard(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise refuse_os_error(e, "removing {}".format(path)) from e


def write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
