"""The operators' lock from the host's side: who this command is, whether a holder is still alive, taking and giving back."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgevit.errors import DeviceRefused, LostLink, Unreachable
from edgevit.fleet.audit import operator as operator_name

if TYPE_CHECKING:
    from device_agents.wire import OperatorLock
    from edgevit.fleet.agent import Agent

LOCK_S = 600.0
"""How long a device waits for an operator that fell silent. Each command on the device gives the whole time again, and one that
takes longer holds the lock while it runs."""

GATE_S = 3600.0
"""The same in a roll-out: a device waits for the others of its wave, a comparison may take long on a slow board, and nothing
may renew the lock meanwhile, since every start of an agent would disturb what is timed."""


@dataclass(frozen=True)
class Operator:
    """One command of one person: ``owner`` as ``user@host``, ``what`` it does, and a ``token`` that no other command has."""

    owner: str
    what: str
    token: str


def this_operator(what: str) -> Operator:
    """This process as an operator. Its token says on which boot of which machine which process it is, so that another command
    on this machine can tell whether it still runs (:func:`has_ended`)."""
    return Operator(operator_name()[:200], what[:400], f"{_this_process(os.getpid())}.{secrets.token_hex(4)}")


def has_ended(token: str) -> bool:
    """Whether the process that made ``token`` ran on this machine, since its last boot, and runs no more. False where that
    cannot be told: another machine's, another container's, or a system without ``/proc``."""
    parts = token.split(".")
    here = _machine()
    if len(parts) != 5 or not here or parts[:2] != list(here) or not parts[2].isdigit():
        return False
    return _started(int(parts[2])) != parts[3]


def _this_process(pid: int) -> str:
    machine = _machine() or (secrets.token_hex(16), "0")
    return ".".join((*machine, str(pid), _started(pid) or "0"))


@functools.cache
def _machine() -> tuple[str, str] | None:
    """The boot and the namespace of process ids that this process lives in; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", "")
        return boot, str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return None


def _started(pid: int) -> str:
    """When a process started, in ticks since boot (proc(5), field 22 of stat); empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def take_lock(agent: Agent, operator: Operator, *, seconds: float = LOCK_S, take_over: bool = False) -> OperatorLock | None:
    """Take the device's lock for ``operator``, or renew it; from now on the agent's commands work under it. Returns the lock of
    a holder that was ended by this: one whose process is known to be gone, or with ``take_over`` anyone.

    DeviceRefused ``locked`` where another operator holds it, with who, since when, until when, and what to type."""
    answer = agent.take_lock(operator.owner, operator.what, operator.token, seconds)
    if not answer.taken and (take_over or has_ended(answer.lock.token)):
        answer = agent.take_lock(operator.owner, operator.what, operator.token, seconds, over=answer.lock.token)
    if not answer.taken:
        raise DeviceRefused(
            "locked",
            f"{agent.name} refused (locked): {answer.lock.text()}",
            hint=f"wait until then; if {answer.lock.owner} is gone: the same command with --take-over",
        )
    agent.operator = operator.token
    return answer.taken_from


def release_lock(agent: Agent, operator: Operator) -> None:
    """Give it back. A link that is gone is no error of what was done: the lock then ends with its time, or at once where the
    next operator is on this machine and sees that this command has ended."""
    agent.operator = ""
    try:
        agent.release_lock(operator.token)
    except (LostLink, Unreachable):
        return


@contextmanager
def holding(
    agent: Agent, operator: Operator, *, take_over: bool = False, keep: bool = False, seconds: float = LOCK_S
) -> Iterator[OperatorLock | None]:
    """The lock for the length of the block; what :func:`take_lock` returns. After a lost link it stays, for the next try; with
    ``keep`` also where all went well."""
    ended = take_lock(agent, operator, seconds=seconds, take_over=take_over)
    try:
        yield ended
    except (LostLink, Unreachable):
        raise
    except BaseException:
        release_lock(agent, operator)
        raise
    if not keep:
        release_lock(agent, operator)


@contextmanager
def holding_where_it_fits(agent: Agent, operator: Operator, *, take_over: bool = False, keep: bool = False) -> Iterator[None]:
    """:func:`holding` for what only removes. A full disk has no room for a lock; without one the device removes nothing either
    while another operator holds it."""
    with ExitStack() as held:
        try:
            held.enter_context(holding(agent, operator, take_over=take_over, keep=keep))
        except DeviceRefused as error:
            if error.code != "no-space":
                raise
        yield
