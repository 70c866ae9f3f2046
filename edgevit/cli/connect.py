"""From what a person types for TARGET to agents that answer, several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from edgevit.cli import exit_code_of, show_error
from edgevit.cli.console import FloatRange, say
from edgevit.errors import EdgevitError, UsageError
from edgevit.places import fleet_path
from edgevit.schedule import AT_ONCE, device_of, over_targets

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.fleet.agent import Agent
    from edgevit.fleet.audit import Action, Detail, Record
    from edgevit.fleet.inventory import Target
    from edgevit.profile import Profile

T = TypeVar("T")

at_once_option = click.option(
    "--at-once",
    type=click.IntRange(1, 256),
    default=AT_ONCE,
    show_default=True,
    metavar="N",
    help="Connections held together; never two to one device.",
)


max_rate_option = click.option(
    "--max-rate",
    type=FloatRange(0.001, 1e6),
    metavar="MBIT",
    help="Send to each device at most this many 10⁶ bits a second; default: no limit.",
)


@dataclass(frozen=True)
class Session:
    """One target with an agent that answers; ``record``: what the audit log will say, where it will."""

    target: Target
    agent: Agent
    record: Record | None = None

    def note(self, **details: Detail) -> None:
        """Details for the audit log, where this is an action that it keeps."""
        if self.record is not None:
            self.record.note(**details)

    def profile(self, facts: Facts) -> Profile:
        """The target's profile; for ``local`` the generic one that its facts propose. A board that is not what the profile
        says is an error."""
        from edgevit.profile import check_target_profile, load_profile, propose_profile

        name = self.target.profile or propose_profile(facts)
        if name is None:
            raise UsageError(
                f"{self.target.name}: no profile fits a {facts.machine} board called {facts.board_model or facts.hostname!r}",
                hint=f"edgevit target add {self.target.name} … --profile P",
            )
        profile = load_profile(name)
        errors = [f for f in check_target_profile(profile, facts) if f.severity == "error"]
        if errors:
            raise UsageError(f"{self.target.name}: " + "; ".join(f.message for f in errors), hint=errors[0].hint)
        return profile


def select_targets(patterns: Sequence[str]) -> list[Target]:
    """Names, patterns, ``tag:x``, ``profile:y`` → targets; an empty selection is an error."""
    from edgevit.fleet.inventory import load_fleet, select

    return select(load_fleet(fleet_path()), patterns)


def target_profile(target: Target) -> str:
    """The profile a target is known by, asking the ``local`` one for its facts."""
    if target.profile:
        return target.profile
    with open_session(target) as session:
        return session.profile(session.agent.probe(quick=True)).name


@contextmanager
def open_session(target: Target, sign_key: Path | None = None) -> Iterator[Session]:
    """Connect; the ``local`` target is provisioned on the way (it is this very machine and this very user)."""
    from edgevit.fleet.connect import connect
    from edgevit.transport.prompts import TerminalPrompts

    with connect(target, TerminalPrompts()) as agent:
        session = Session(target, agent)
        if target.name == "local":
            _provision_local(session, sign_key)
        yield session


def _provision_local(session: Session, sign_key: Path | None) -> None:
    from edgevit import signing
    from edgevit.cli.key import principal

    key = sign_key or signing.default_key_path()
    if not key.exists():
        return
    public = signing.public_line(key)
    line = signing.allowed_signers_line(principal(), public)
    if line not in session.agent.signers():
        from edgevit.fleet.audit import Action, recording

        with recording(Action("key allow", {"key": signing.fingerprint(public), "signer": principal()}), session.target):
            session.agent.allow([line], replace=False)
        say(f"local: {signing.fingerprint(public)} may sign from now on")


def each_target(
    patterns: Sequence[str],
    work: Callable[[Session], T],
    *,
    sign_key: Path | None = None,
    action: Action | None = None,
    at_once: int = AT_ONCE,
) -> tuple[list[tuple[str, T]], int]:
    """:func:`try_each_target` with the failures shown as they stand: (what came back by target, the exit code).

    3 if a device was unreachable or refused, else the worst other.
    """
    done, failed = try_each_target(patterns, work, sign_key=sign_key, action=action, at_once=at_once)
    return done, show_failures(failed)


def try_each_target(
    patterns: Sequence[str],
    work: Callable[[Session], T],
    *,
    sign_key: Path | None = None,
    action: Action | None = None,
    at_once: int = AT_ONCE,
) -> tuple[list[tuple[str, T]], list[tuple[str, EdgevitError]]]:
    """``work`` on every target selected, ``at_once`` in parallel: what came back, and what failed, by target.

    An ``action`` is kept in the audit log for each target, however it ends there.
    """
    from edgevit.fleet.audit import recording

    targets = {t.name: t for t in select_targets(patterns)}

    def one(name: str) -> T:
        with ExitStack() as opened:
            record = opened.enter_context(recording(action, targets[name])) if action is not None else None
            session = opened.enter_context(open_session(targets[name], sign_key))
            return work(replace(session, record=record))

    return over_devices(targets, one, at_once=at_once)


def over_devices(
    targets: Mapping[str, Target], work: Callable[[str], T], *, at_once: int
) -> tuple[list[tuple[str, T]], list[tuple[str, EdgevitError]]]:
    """:func:`edgevit.schedule.over_targets`, never two pieces of work on one device; Ctrl-C is answered."""

    def on_stop() -> None:
        say("stopping: no other device is begun, what is under way is finished; Ctrl-C again leaves at once")

    return over_targets(list(targets), work, at_once=at_once, device=lambda name: device_of(targets[name]), on_stop=on_stop)


def say_stopping() -> None:
    """After Ctrl-C in the middle of a measurement."""
    say("stopping: what is under way here is finished; Ctrl-C again leaves at once. Devices measure on: edgevit collect")


def show_failures(failed: Sequence[tuple[str, EdgevitError]]) -> int:
    """Each failure with its target; the exit code of all of them together."""
    for name, error in failed:
        text = str(error)
        show_error(EdgevitError(text if text.startswith(name) else f"{name}: {text}", hint=error.hint))
    return exit_code_of(error for _, error in failed)
