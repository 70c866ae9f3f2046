"""One operator at a time: who alone may change what is installed and active on this device, and for how long.

An operator takes the lock for a command and gives it back at its end; one that dies loses it when its time is up. Its time is
counted on the clock that no one sets (``CLOCK_BOOTTIME``, clock_gettime(2)), and a reboot ends it, so a step of the wall clock
neither shortens nor prolongs it; the times of day in it are for people. While a command of the holder is at work on the device
(an upload that takes longer than its time) the lock holds, and each of its commands gives it its whole time again.

It is advice among operators who may all log in, no protection against one who does not ask: the token is no secret.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Optional

from device_agents import wire
from device_agents.clock import utc_text
from device_agents.codec import number, text
from device_agents.errors import Refused
from device_agents.root import Root

HELD_ALONE = ("activate", "rollback", "gc", "uninstall", "unprovision")
"""Commands that another operator's lock keeps out. ``install`` only adds what nothing uses yet (a measurement does that too):
it is refused only to an operator who has lost the lock meanwhile."""

COMMANDS = ("install",) + HELD_ALONE
MOST_S = 7200.0
WAIT_S = 10.0
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Held:
    """The whole of ``operator.json``. ``ends_s``: on the clock since boot; ``seconds``: what it was taken for."""

    lock: wire.OperatorLock
    boot_id: str = text(max_len=60)
    ends_s: float = number(0.0, 1e12)
    seconds: float = number(0.0, MOST_S)


@dataclass(frozen=True)
class _Take:
    owner: str = text(max_len=200)
    what: str = text(max_len=400)
    token: str = text(wire.TOKEN_PATTERN, 160)
    seconds: float = number(1.0, MOST_S)
    over: str = text(max_len=160, default="")


def left_s(held: Held, boot_id: str, now_s: float) -> float:
    """How long ``held`` still holds, in seconds; 0 once it is over. Pure.

    More than it was taken for cannot be left: then the clock began anew without the boot id telling.
    """
    left = held.ends_s - now_s
    return left if held.boot_id == boot_id and 0.0 < left <= held.seconds else 0.0


def take(store: Root, console: Any) -> Dict[str, Any]:
    """Take the lock, or renew one's own: whether it was taken, and the lock as it is now. ``over`` names the token of a holder
    that is known to be gone: its lock is taken as if it were over, nobody else's."""
    try:
        asked = wire.decode(_Take, console.read_json("operator-take"), "operator-take")
    except wire.WireError as e:
        raise Refused("bad-request", str(e)) from e
    store.create()
    with _alone(store):
        held = _holder(store)
        if held is not None and held.lock.token not in (asked.token, asked.over):
            return {"taken": False, "lock": wire.encode(held.lock), "from": None}
        mine = held is not None and held.lock.token == asked.token
        since = held.lock.since if held is not None and mine else utc_text(time.time_ns())
        lock = _write(store, asked.owner, asked.what, asked.token, since, asked.seconds)
    return {"taken": True, "lock": wire.encode(lock), "from": None if mine or held is None else wire.encode(held.lock)}


def release(store: Root, token: str) -> Dict[str, Any]:
    """Give the lock back; false where it is not this token's any more."""
    if not store.operator_path.exists():
        return {"released": False}
    with _alone(store):
        held = _read(store)
        mine = held is not None and held.lock.token == token
        if mine:
            store.remove(store.operator_path)
    return {"released": mine}


@contextlib.contextmanager
def permitted(store: Root, command: str, token: str) -> Iterator[None]:
    """Around a command that changes what is there. ``token`` empty: of one who holds no lock.

    Raises ``locked``, naming the holder, where another operator holds it, or took it while this one was away.
    """
    if not store.operator_path.exists() and not token:
        yield
        return
    store.create()
    with contextlib.ExitStack() as at_work:
        with _alone(store):
            held = _holder(store)
            if held is not None and held.lock.token != token and (token or command in HELD_ALONE):
                raise Refused("locked", held.lock.text(), "wait until then, or take the lock over if that operator is gone")
            if token:
                if not _renew(store, token):
                    raise Refused("locked", "another operator had the lock since this command took it", "plan and deploy again")
                at_work.callback(os.close, _mark_at_work(store))
        yield
        if token and store.operator_path.exists():
            with _alone(store):
                _renew(store, token)


def _renew(store: Root, token: str) -> bool:
    """Give the lock its whole time again; False where it is another's or nobody's."""
    held = _read(store)
    if held is None or held.lock.token != token:
        return False
    lock = held.lock
    _write(store, lock.owner, lock.what, token, lock.since, held.seconds)
    return True


def _write(store: Root, owner: str, what: str, token: str, since: str, seconds: float) -> wire.OperatorLock:
    until = utc_text(time.time_ns() + int(seconds * 1e9))
    lock = wire.OperatorLock(owner, what, token, since, until, int(seconds))
    held = Held(lock, boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME) + seconds, seconds)
    store.write(store.operator_path, wire.dumps(held))
    return lock


def _holder(store: Root) -> Optional[Held]:
    """Who holds the lock now, with the seconds that are left (0 only once none is); None where nobody does."""
    held = _read(store)
    if held is None:
        return None
    left = left_s(held, boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME))
    if left <= 0.0 and not _is_at_work(store):
        return None
    lock = held.lock
    return Held(
        wire.OperatorLock(lock.owner, lock.what, lock.token, lock.since, lock.until, math.ceil(left)),
        held.boot_id,
        held.ends_s,
        held.seconds,
    )


def _read(store: Root) -> Optional[Held]:
    data = store.read(store.operator_path, wire.MAX_JOB_BYTES)
    if data is None:
        return None
    try:
        return wire.loads(Held, data, "operator.json", wire.MAX_JOB_BYTES)
    except wire.WireError:
        # Written whole or not at all, so this is another agent's version or a bad card; a lock that nobody can read must not
        # keep everyone out for good.
        return None


@contextlib.contextmanager
def _alone(store: Root) -> Iterator[None]:
    """Reading and then writing the lock's file, one process at a time."""
    deadline = time.monotonic() + WAIT_S
    while True:
        fd = store.try_lock(store.root / "operator.lock", _FLAGS)
        if fd is not None:
            break
        if time.monotonic() >= deadline:
            raise Refused("busy", "the operators' lock of {} was not free for {:.0f} s".format(store.root, WAIT_S))
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(fd)


def _mark_at_work(store: Root) -> int:
    fd = store.try_lock(store.root / "operator.work", _FLAGS, fcntl.LOCK_SH)
    if fd is None:  # only _is_at_work takes it alone, for a moment, and that under the same lock as this
        raise Refused("busy", "another command holds {}".format(store.root / "operator.work"))
    return fd


def _is_at_work(store: Root) -> bool:
    fd = store.try_lock(store.root / "operator.work", _FLAGS)
    if fd is None:
        return True
    os.close(fd)
    return False


def boot_id() -> str:
    """The kernel's name for the time since it started; empty where it gives none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f.read().strip()[:60]
    except OSError:
        return ""
