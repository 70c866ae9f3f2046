"""One device's part in a deployment: lock, facts, plan, apply, over as many connections as it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from device_agents.wire import encode
from edgevit.cli.connect import Session, open_session
from edgevit.cli.selection import choose_stored
from edgevit.errors import DeviceRefused, EdgevitError, LostLink, Unreachable
from edgevit.fleet.audit import Action, Detail, Entry, recording
from edgevit.fleet.deploy import DeployOutcome, DeployPlan, add_earlier_tries, apply_plan, check_pin, describe, plan_deploy
from edgevit.fleet.operator import GATE_S, LOCK_S, Operator, holding, release_lock
from edgevit.fleet.pace import Estimate, estimate
from edgevit.fleet.retry import keep_trying
from edgevit.progress import OneLine, Progress
from edgevit.select import Gates

if TYPE_CHECKING:
    from device_agents.wire import Active, Facts, Variant
    from edgevit.bundle import Bundle
    from edgevit.fleet.inventory import Target
    from edgevit.results.store import Store
    from edgevit.select import Choice


@dataclass(frozen=True)
class Order:
    """What a command wants on every target. ``wanted`` is a policy, a variant, or None for the first that runs; ``store`` is
    there where a policy wants it."""

    bundle: Bundle
    operator: Operator
    wanted: str | None = None
    gates: Gates = field(default_factory=Gates)
    store: Store | None = None
    allow_older: bool = False
    prune: bool = False
    take_over: bool = False
    despite_pin: bool = False
    max_rate_mbit: float | None = None
    retries: int = 0
    details: tuple[tuple[str, Detail], ...] = ()

    def action(self, what: str) -> Action:
        """For the audit log."""
        manifest = self.bundle.manifest
        named: dict[str, Detail] = {"bundle": manifest.name, "version": manifest.version, "digest": self.bundle.digest}
        return Action(what, {**named, **dict(self.details)})


@dataclass(frozen=True)
class Shipped:
    """What became of one target: ``active`` is what it has now, ``before`` what it would go back to; ``plan`` is of the last
    try, ``outcome`` of all."""

    plan: DeployPlan
    outcome: DeployOutcome
    active: Active
    before: Active | None
    choice: Choice | None
    seconds: float
    links_lost: int
    took_over: str

    def as_json(self) -> dict[str, Any]:
        """The outcome and what it took, as plain values."""
        value = {**self.outcome.as_json(), "seconds": round(self.seconds, 3), "links_lost": self.links_lost}
        if self.took_over:
            value["took_over"] = self.took_over
        if self.choice is not None:
            value["choice"] = encode(self.choice)
        return value


@dataclass(frozen=True)
class Planned:
    """What a deployment would do to one target, and how long it would take."""

    plan: DeployPlan
    estimate: Estimate
    choice: Choice | None

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        value = {**self.plan.as_json(), "seconds": self.estimate.seconds, "seconds_absent": self.estimate.absent}
        if self.choice is not None:
            value["choice"] = encode(self.choice)
        return value


def plan_one(order: Order, target: Target, entries: Sequence[Entry], progress: Progress) -> Planned:
    """Look and plan; nothing is changed, and another operator's lock does not matter."""
    progress.start(target.name, f"{target.name}: looking")
    ended = "failed"
    try:
        if not order.despite_pin:
            check_pin(target, order.bundle.manifest)
        with open_session(target) as session:
            plan, choice, _ = _plan(order, session)
        expected = estimate(entries, target.name, plan.send_bytes, plan.activate is not None, order.max_rate_mbit)
        ended = "planned"
        return Planned(plan, expected, choice)
    except EdgevitError as error:
        ended = outcome_word(error)
        raise
    finally:
        progress.finish(target.name, f"{target.name}: {ended}")


def ship_one(order: Order, target: Target, progress: Progress, *, keep_lock: bool = False) -> Shipped:
    """Ship and activate under the device's lock, which ``keep_lock`` leaves in this command's hands, and for as long as a wave
    may take; kept in the audit log.

    A lost link is taken up again: facts, plan and upload begin anew, and what arrived is not sent twice.
    """
    name, line, began = target.name, OneLine(progress, target.name), time.monotonic()
    ended, plans = "failed", list[DeployPlan]()
    line.start(name, f"{name}: connecting")
    try:
        with recording(order.action("deploy"), target) as record:
            if not order.despite_pin:
                check_pin(target, order.bundle.manifest)

            def work(session: Session) -> tuple[DeployPlan, DeployOutcome, Choice | None, Facts, str]:
                line.start(name, f"{name}: facts and plan")
                seconds = GATE_S if keep_lock else LOCK_S
                lock = holding(session.agent, order.operator, take_over=order.take_over, keep=keep_lock, seconds=seconds)
                with lock as ended_lock:
                    plan, choice, facts = _plan(order, session)
                    plans.append(plan)
                    record.note(variant=describe(plan.wanted), policy=plan.policy)
                    outcome = apply_plan(plan, order.bundle, session.agent, line)
                return plan, outcome, choice, facts, ended_lock.owner if ended_lock else ""

            (plan, outcome, choice, facts, took_over), lost = keep_trying(
                lambda: open_session(target),
                work,
                retries=order.retries,
                on_wait=lambda text: line.start(name, f"{name}: {text}"),
            )
            active = outcome.active or facts.active
            if active is None:
                raise DeviceRefused("no-active", f"{name}: nothing is active there after it was activated")
            before = facts.active if outcome.active is not None else facts.previous
            outcome = add_earlier_tries(outcome, plans[0], plan, active)
            record.note(sent_bytes=outcome.sent_bytes, send_ms=round(1000 * outcome.send_seconds))
            record.note(activated=outcome.active is not None, links_lost=lost)
            if took_over:
                record.note(took_over=took_over)
        if choice is not None and order.store is not None:
            order.store.add_choice(choice)
        ended = "deployed" if outcome.changed else "was there"
        return Shipped(plan, outcome, active, before, choice, time.monotonic() - began, lost, took_over)
    except EdgevitError as error:
        ended = outcome_word(error)
        raise
    finally:
        progress.finish(name, f"{name}: {ended}")


def release_one(order: Order, target: Target) -> None:
    """Give back a lock that ``ship_one`` left in this command's hands."""
    try:
        with open_session(target) as session:
            release_lock(session.agent, order.operator)
    except (LostLink, Unreachable):
        return  # it ends with its time, or when the next operator here sees that this command has ended


def _plan(order: Order, session: Session) -> tuple[DeployPlan, Choice | None, Facts]:
    session.agent.max_rate_mbit = order.max_rate_mbit
    facts = session.agent.probe()
    variant, policy, choice = pick(order, session, facts)
    bundle = order.bundle
    have = session.agent.have(bundle.manifest.blobs(), bundle.read_chunk_index())
    remove = session.agent.foresee_gc(bundle) if order.prune else None
    plan = plan_deploy(bundle, session.target.name, facts, have, variant, policy, allow_older=order.allow_older, remove=remove)
    return plan, choice, facts


def pick(order: Order, session: Session, facts: Facts) -> tuple[Variant, str, Choice | None]:
    """The variant to activate, how it was chosen in the words that the device keeps, and the choice where a policy made it."""
    from edgevit.variants import find_variant, list_variants, require_runnable

    name, bundle, wanted = session.target.name, order.bundle, order.wanted
    found = list_variants(bundle.manifest, bundle.digest, facts, session.profile(facts), every=wanted is not None)
    require_runnable(found, name, facts)
    if wanted is None:
        return found.variants[0], "first that runs", None
    if order.store is None:
        return find_variant(found, wanted), f"selected: {wanted}", None
    choice = choose_stored(order.store, name, bundle, facts, found, wanted, order.gates)
    return choice.variant, f"{wanted} by {', '.join(choice.runs)}"[:400], choice


def outcome_word(error: EdgevitError) -> str:
    """One word or two for what kept a device from being deployed to."""
    from edgevit.errors import Pinned, UsageError
    from edgevit.fleet.check import STATES

    if isinstance(error, UsageError):
        return "pinned" if isinstance(error, Pinned) else "not possible"
    if isinstance(error, DeviceRefused) and error.code in ("locked", "older-version", "no-space", "golden-mismatch"):
        return error.code
    return next((word for kind, word in STATES if isinstance(error, kind)), "failed")
