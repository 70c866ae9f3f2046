"""A roll-out: waves of deployments, gates after each, and the way back. What to do next is decided in fleet/rollout.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.connect import Session, open_session, show_failures
from edgevit.cli.console import emit_json, has_terminal, out, say
from edgevit.cli.ship import Order, Shipped, outcome_word, release_one, ship_one
from edgevit.errors import DeviceRefused, EdgevitError, GateFailed, UsageError
from edgevit.fleet.audit import Action, read_log, recording
from edgevit.fleet.deploy import check_pin, describe
from edgevit.fleet.gates import Gate, find_stored, find_unjudgeable, judge_run
from edgevit.fleet.operator import GATE_S, take_lock
from edgevit.fleet.retry import keep_trying
from edgevit.fleet.rollout import Decision, Member, decide, plan_waves
from edgevit.fleet.undo import restore
from edgevit.places import audit_path
from edgevit.progress import OneLine, Progress

if TYPE_CHECKING:
    from device_agents.wire import Active, Facts, RunPlan
    from edgevit.cli.rollout_options import Rollout
    from edgevit.fleet.agent import Agent
    from edgevit.fleet.audit import Detail
    from edgevit.fleet.inventory import Target
    from edgevit.results.store import Store


@dataclass
class Course:
    """What a roll-out has come to so far; the report is made of it."""

    shipped: dict[str, Shipped | str] = field(default_factory=dict)
    gates: list[tuple[str, Sequence[Gate]]] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    failed: list[tuple[str, EdgevitError]] = field(default_factory=list)


def roll_out(
    order: Order,
    rollout: Rollout,
    targets: Sequence[Target],
    path: Path,
    *,
    dry_run: bool,
    at_once: int,
    as_json: bool,
) -> int:
    """Wave after wave, until one is not let stay or all are done; the exit code. ``path``: the bundle as it was typed."""
    by_name = {t.name: t for t in targets}
    waves = plan_waves(rollout.waves, list(by_name))
    _require_answers(rollout, waves, path)
    _require_pins(order, targets)
    for number, wave in enumerate(waves, 1):
        say(f"wave {number} of {len(waves)}: {', '.join(wave)}")
    if beyond := len(by_name) - sum(len(wave) for wave in waves):
        say(f"{beyond} of {len(by_name)} devices are in no wave and stay as they are; --wave 100% takes them too")
    taken = [by_name[name] for wave in waves for name in wave]
    _require_gates(order, rollout, taken, at_once)
    if dry_run:
        from edgevit.cli.deploy import show_plans

        return show_plans(order, taken, at_once=at_once, as_json=as_json)
    course, decision, tried = Course(), Decision("finished"), 0
    for number, wave in enumerate(waves, 1):
        if rollout.pause and number > 1 and not click.confirm(f"go on with wave {number} of {len(waves)}?", err=True):
            decision = Decision("stop", (f"stopped before wave {number} as was answered",))
            break
        tried = number
        one = _Wave(replace(order, details=(("wave", number),)), rollout, [by_name[n] for n in wave], course, at_once, number)
        decision = one.run(len(waves) - number)
        if decision.next in ("stop", "roll back"):
            break
    for wave in waves[tried:]:
        course.shipped.update(dict.fromkeys(wave, "not tried"))
    return _report(order.bundle.manifest.name, course, decision, waves, tried, as_json)


def _require_answers(rollout: Rollout, waves: Sequence[Sequence[str]], path: Path) -> None:
    if rollout.pause and len(waves) > 1 and not has_terminal():
        raise UsageError(
            "--pause asks before each wave, and there is no terminal to ask on; nothing was begun",
            hint=f"edgevit deploy {path} … --wave {rollout.waves[0].text()} alone, then the same with "
            f"--wave {rollout.waves[0].text()} --wave {rollout.waves[1].text()}",
        )


def _require_pins(order: Order, targets: Sequence[Target]) -> None:
    """A roll-out that would leave out one of its devices is another one than was asked for: refused before anything is done."""
    if not order.despite_pin:
        for target in targets:
            check_pin(target, order.bundle.manifest)


def _require_gates(order: Order, rollout: Rollout, targets: Sequence[Target], at_once: int) -> None:
    """UsageError where a gate cannot be judged on some device whatever is measured there: said before anything is done. Devices
    that do not answer now are seen when their wave comes."""
    from edgevit.cli.deploy import on_devices

    limits, digest, entries = rollout.limits, order.bundle.digest, read_log(audit_path()).entries
    if not limits.wanted:
        return

    def look(target: Target, progress: Progress) -> list[tuple[str, str]]:
        progress.start(target.name, f"{target.name}: looking")
        try:
            with open_session(target) as session:
                facts = session.agent.probe(quick=True)
        finally:
            progress.finish(target.name)
        there = facts.active
        if there is not None and there.variant.bundle == digest:
            if find_stored(entries, target.name, there.activated_at, limits):
                return []
            there = facts.previous
        return find_unjudgeable(limits, order.bundle.manifest, facts, there.variant if there else None)

    done, _ = on_devices("looking at what is active", targets, look, at_once=at_once)
    found = [(name, gate, why) for name, reasons in done for gate, why in reasons]
    if found:
        lines = [f"{name}: {gate} cannot be judged: {why}" for name, gate, why in found]
        shown = "\n".join(lines[:12] + [f"… and {len(lines) - 12} more"] * (len(lines) > 12))
        waive = " ".join(f"--without-gate {gate}" for gate in dict.fromkeys(gate for _, gate, _ in found))
        raise UsageError(f"nothing was begun; some gates cannot be judged:\n{shown}", hint=f"edgevit deploy … {waive}")


class _Wave:
    """One wave: ship, judge, and leave it or take it back. The devices' locks are held until that is over."""

    def __init__(
        self, order: Order, rollout: Rollout, targets: Sequence[Target], course: Course, at_once: int, number: int
    ) -> None:
        self._order, self._rollout, self._targets, self._course = order, rollout, targets, course
        self._at_once, self._number = at_once, number
        self._by_name = {t.name: t for t in targets}
        self._bundle = f"{order.bundle.manifest.name} v{order.bundle.manifest.version}"

    def run(self, waves_left: int) -> Decision:
        """What came of it, added to the course."""
        from edgevit.cli.deploy import on_devices

        course = self._course
        try:
            shipped, failed = on_devices(
                f"wave {self._number}: deploying {self._bundle}",
                self._targets,
                self._ship,
                at_once=self._at_once,
            )
            members = [self._not_shipped(name, error) for name, error in failed]
            if any(m.end == "gate failed" for m in members):
                members += [Member(name, "passed") for name, _ in shipped]  # the wave goes back whatever they would show
            else:
                members += self._judge(dict(shipped))
            decision = decide(course.members, members, self._rollout.max_failed, waves_left)
            course.members += members
            if decision.next == "roll back":
                self._take_back(dict(shipped), decision)
        finally:
            self._release()
        return decision

    def _ship(self, target: Target, progress: Progress) -> Shipped:
        """Noted at once: where Ctrl-C ends the wave, the locks of those shipped so far are given back."""
        self._course.shipped[target.name] = shipped = ship_one(self._order, target, progress, keep_lock=True)
        return shipped

    def _not_shipped(self, name: str, error: EdgevitError) -> Member:
        self._course.failed.append((name, error))
        self._course.shipped[name] = outcome_word(error)
        golden = isinstance(error, DeviceRefused) and error.code == "golden-mismatch"
        return Member(name, "gate failed" if golden else "failed", _own_words(name, error))

    # ---- gates -------------------------------------------------------------------------------------------------------

    def _judge(self, shipped: dict[str, Shipped]) -> list[Member]:
        from edgevit.cli.deploy import on_devices
        from edgevit.results.store import open_store

        if not self._rollout.limits.wanted or not shipped:
            return [Member(name, "passed") for name in shipped]
        with open_store() as store:
            batch = store.new_batch(f"roll-out of {self._bundle}, wave {self._number}")

            def one(target: Target, progress: Progress) -> tuple[Gate, ...]:
                return self._judge_one(target, shipped[target.name], store, batch, progress)

            done, failed = on_devices(
                f"wave {self._number}: judging",
                [self._by_name[name] for name in shipped],
                one,
                at_once=self._at_once,
            )
        members = [Member(name, "passed") for name, _ in done]
        self._course.gates += done
        for name, error in failed:
            self._course.failed.append((name, error))
            gate = isinstance(error, GateFailed)
            members.append(Member(name, "gate failed" if gate else "failed", _own_words(name, error)))
            self._course.ends[name] = "gate failed" if gate else "not judged"
        return members

    def _judge_one(self, target: Target, shipped: Shipped, store: Store, batch: str, progress: Progress) -> tuple[Gate, ...]:
        """The gates of one device, from the log where they held for this very activation, else measured now. GateFailed where
        one does not hold."""
        limits, active = self._rollout.limits, shipped.active
        known = find_stored(read_log(audit_path()).entries, target.name, active.activated_at, limits)
        if known is not None:
            return tuple(
                Gate(name, True, f"held on {known.at}: {known.details[name]}")
                for name in limits.wanted
                if name in known.details
            )
        details: dict[str, Detail] = {
            "bundle": active.bundle_name,
            "version": active.bundle_version,
            "digest": active.variant.bundle,
        }
        action = Action("gate", {**details, "activated_at": active.activated_at, "limits": limits.text()})
        with recording(action, target) as record:
            progress.start(target.name, f"{target.name}: judging")
            try:
                gates = self._measure(target, shipped, store, batch, progress)
            finally:
                progress.finish(target.name)
            record.note(**{gate.name: gate.text for gate in gates})
            if lost := [gate for gate in gates if not gate.held]:
                self._course.gates.append((target.name, gates))
                raise GateFailed(f"{target.name}: " + "; ".join(gate.text for gate in lost))
        return gates

    def _measure(self, target: Target, shipped: Shipped, store: Store, batch: str, progress: Progress) -> tuple[Gate, ...]:
        from edgevit.bench import make_job, measure
        from edgevit.plans import memory_limit_mb

        limits, active, before = self._rollout.limits, shipped.active, shipped.before
        line = OneLine(progress, target.name)

        def begin(session: Session) -> Facts:
            # Renewed for as long as a measurement may take: see GATE_S.
            take_lock(session.agent, self._order.operator, seconds=GATE_S)
            return session.agent.probe(quick=True)

        def again(text: str) -> None:
            line.start(target.name, f"{target.name}: {text}")

        facts, _ = keep_trying(lambda: open_session(target), begin, retries=self._order.retries, on_wait=again)
        known = find_unjudgeable(limits, self._order.bundle.manifest, facts, before.variant if before else None)
        if known or before is None:
            return tuple(Gate(gate, False, f"{gate} cannot be judged: {why}", judged=False) for gate, why in known)
        plan = gate_plan(self._rollout)
        limit = None if target.is_local else memory_limit_mb(facts)
        job = make_job(target.name, batch, plan, [before.variant, active.variant], memory_limit_mb=limit)
        with ExitStack() as links:

            def reconnect() -> Agent:
                return links.enter_context(open_session(target)).agent

            run = measure(reconnect(), job, store, line, reconnect).run
        return judge_run(run, before.variant, active.variant, limits)

    # ---- the way back ------------------------------------------------------------------------------------------------

    def _take_back(self, shipped: dict[str, Shipped], decision: Decision) -> None:
        from edgevit.cli.deploy import on_devices

        why = "; ".join(decision.reasons)

        def one(target: Target, progress: Progress) -> Active:
            progress.start(target.name, f"{target.name}: going back")
            try:
                return self._restore(target, shipped[target.name], why, progress)
            finally:
                progress.finish(target.name)

        targets = [self._by_name[name] for name in shipped]
        done, failed = on_devices(f"wave {self._number}: going back", targets, one, at_once=self._at_once)
        self._course.ends.update({name: "rolled back" for name, _ in done})
        self._course.ends.update({name: "NOT rolled back" for name, _ in failed})
        self._course.failed += failed

    def _restore(self, target: Target, shipped: Shipped, why: str, progress: Progress) -> Active:
        before = shipped.before
        with recording(Action("rollback", {"why": why, "wave": self._number}), target) as record:
            if before is None:
                raise GateFailed(
                    f"{target.name}: nothing was active before, so there is nothing to go back to; "
                    f"{shipped.active.bundle_name} v{shipped.active.bundle_version} stays active",
                    hint=f"edgevit deploy ANOTHER {target.name} --allow-older",
                )
            wanted = before.variant

            def one(session: Session) -> Active:
                take_lock(session.agent, self._order.operator)
                return restore(session.agent, shipped.active.activated_at, wanted)

            def again(text: str) -> None:
                progress.start(target.name, f"{target.name}: {text}")

            active, _ = keep_trying(lambda: open_session(target), one, retries=self._order.retries, on_wait=again)
            record.note(bundle=active.bundle_name, version=active.bundle_version, digest=active.variant.bundle)
            record.note(variant=describe(active.variant), policy=active.policy)
            return active

    def _release(self) -> None:
        from edgevit.schedule import over_targets

        held = [name for name in self._by_name if isinstance(self._course.shipped.get(name), Shipped)]
        over_targets(held, lambda name: release_one(self._order, self._by_name[name]), at_once=self._at_once)


def _own_words(name: str, error: EdgevitError) -> str:
    """The first line of what an error says, without the name that stands before it anyway."""
    return str(error).splitlines()[0].removeprefix(f"{name}: ").removeprefix(f"{name} ")


def gate_plan(rollout: Rollout) -> RunPlan:
    """How both variants are measured: ABBA blocks, and top-1 where its gate is wanted. Without the gate of p90 a single block
    tells the rest."""
    from edgevit.plans import PLANS, with_blocks

    wanted = rollout.limits.wanted
    plan = replace(PLANS["compare"], accuracy="accuracy" in wanted)
    return with_blocks(plan, rollout.blocks if "p90" in wanted else 1)


def _report(bundle: str, course: Course, decision: Decision, waves: Sequence[Sequence[str]], tried: int, as_json: bool) -> int:
    """Tables, reasons and the exit code: 1 where a gate did not hold or a person stopped it, 3 where devices failed."""
    from edgevit.report.deploy_view import render_gates, render_shipped

    unrestored = [name for name, end in course.ends.items() if end == "NOT rolled back"]
    # What gates said stands in the table and below it; why a device could not go back is said nowhere else.
    shown = [(name, error) for name, error in course.failed if not isinstance(error, GateFailed)]
    last = dict(course.failed)
    code = show_failures(shown + [(name, last[name]) for name in unrestored if isinstance(last[name], GateFailed)])
    if decision.next == "roll back":
        code = code if unrestored else 1
    code = code or int(decision.next != "finished")
    numbers = {name: number for number, wave in enumerate(waves, 1) for name in wave}
    names = [name for wave in waves for name in wave]
    if as_json:
        emit_json("rollout", _report_json(course, decision, numbers, names))
    else:
        rows = [(name, course.shipped.get(name, "not tried")) for name in names]
        out().print(render_shipped(bundle, rows, numbers, course.ends))
        if course.gates:
            out().print("")
            out().print(render_gates(course.gates))
    for line in _sum_up(decision, len(waves), tried, unrestored):
        say(line)
    return code


def _sum_up(decision: Decision, waves: int, tried: int, unrestored: Sequence[str]) -> Iterator[str]:
    if decision.next == "finished":
        yield f"rolled out in {waves} wave{'s' if waves != 1 else ''}"
    elif decision.next == "roll back":
        yield f"wave {tried} of {waves} was rolled back{', but for ' * bool(unrestored)}{', '.join(unrestored)}:"
    else:
        yield f"stopped after wave {tried} of {waves}; the same command goes on there:"
    for reason in decision.reasons:
        yield f"  {reason}"


def _report_json(course: Course, decision: Decision, numbers: dict[str, int], names: Sequence[str]) -> dict[str, Any]:
    from dataclasses import asdict

    gates = {name: [asdict(gate) for gate in found] for name, found in course.gates}
    errors = dict(course.failed)
    values = []
    for name in names:
        one = course.shipped.get(name, "not tried")
        value: dict[str, Any] = {"target": name, "wave": numbers[name], "gates": gates.get(name, [])}
        if isinstance(one, Shipped):
            value.update(one.as_json())
        did = one if isinstance(one, str) else ("deployed" if one.outcome.changed else "was there")
        value["outcome"] = course.ends.get(name, did)
        if name in errors:
            from edgevit.cli.console import error_json

            value["error"] = error_json(errors[name])
        values.append(value)
    return {"decision": decision.next, "reasons": list(decision.reasons), "targets": values}
