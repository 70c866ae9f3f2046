"""Provisioning: a private Python environment with the runtimes that fit, from wheels resolved here, and who may sign for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from device_agents import wire
from edgevit.cache import Cache
from edgevit.errors import NotProvisioned
from edgevit.fleet.agent import Agent, Provisioned
from edgevit.fleet.wheel_index import IndexUnreachable, NoWheel, PipIndex
from edgevit.fleet.wheel_platform import WheelPlatform, platform_of
from edgevit.fleet.wheelhouse import Wheelhouse, resolve, resolve_remembered
from edgevit.profile import Profile
from edgevit.profile_model import RuntimeOption
from edgevit.progress import Progress

PILLOW = "pillow>=10"


@dataclass(frozen=True)
class Wishes:
    """How a person wants it: wheels from the folder ``wheelhouse`` and no index; Pillow for images on the device; ``upgrade``
    to what is newest today."""

    wheelhouse: Path | None = None
    with_pillow: bool = False
    upgrade: bool = False


@dataclass(frozen=True)
class ProvisionPlan:
    """``groups``: pip requirements by the runtime they bring; ``extras``: others. ``system_site``: the environment sees the
    system's packages, where a board's runtime comes from its vendor; such a runtime stays with the packages ``given`` it was
    built for, and its providers in ``keep`` must work afterwards too."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    extras: tuple[str, ...]
    system_site: bool
    runtimes: tuple[str, ...]
    without: tuple[str, ...]
    given: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys([r for _, group in self.groups for r in group] + list(self.extras)))

    def without_runtime(self, runtime: str, reason: str) -> ProvisionPlan:
        """The same plan less one runtime, which says why."""
        groups = tuple(g for g in self.groups if g[0] != runtime)
        runtimes = tuple(r for r in self.runtimes if r != runtime)
        return replace(self, groups=groups, runtimes=runtimes, without=(*self.without, f"{runtime}: {reason}"))


def plan_provision(target: str, profile: Profile, facts: wire.Facts, with_pillow: bool = False) -> ProvisionPlan:
    """Which pip requirements bring this board's runtimes to its Python. Pure.

    A runtime that the vendor's system brings and that is proven already is left alone. Facts do not tell a vendor's runtime
    from the wheel that an earlier provisioning installed; a proven provider that no wheel has does. Pillow that is there stays.
    NotProvisioned, naming what to install, where Python or ``ssh-keygen -Y`` is missing or no runtime is known for this Python.
    """
    if facts.ssh_keygen is None:
        why = facts.absent.get("ssh_keygen", "it has no ssh-keygen -Y")
        raise NotProvisioned(
            f"{target}: {why}; signatures cannot be verified there",
            hint="on the device: sudo apt install openssh-client (8.1 or newer)",
        )
    machine = platform_of(target, facts).machine
    options = profile.options(machine)
    vendors = {r.runtime: r for r in facts.runtimes if _is_vendors(r, options, facts.python)}
    groups: dict[str, tuple[str, ...]] = {}
    runtimes: list[str] = []
    without: list[str] = []
    for option in options:
        wanted = option.requirements(facts.python)
        if option.runtime in vendors:
            runtimes.append(option.runtime)
        elif wanted:
            groups.setdefault(option.runtime, wanted)
            runtimes.append(option.runtime)
        else:
            source = option.system or f"no wheel is known for Python {facts.python}"
            without.append(f"{option.runtime}: {source}")
    if not runtimes:
        raise NotProvisioned(
            f"{target}: no runtime of {profile.name} is known for Python {facts.python} on {machine}: "
            f"{'; '.join(without) or 'the profile has none for this machine'}",
            hint=profile.python_hint or f"edgevit profiles show {profile.name}",
        )
    has_pillow = facts.environment is not None and PILLOW in facts.environment.requirements
    return ProvisionPlan(
        groups=tuple(groups.items()),
        extras=(PILLOW,) if with_pillow or has_pillow else (),
        system_site=any(option.system for option in options),
        runtimes=tuple(dict.fromkeys(runtimes)),
        without=tuple(without),
        given=(("numpy", facts.numpy),) if vendors and facts.numpy else (),
        keep=tuple(f"{r.runtime}/{p.name}" for r in vendors.values() for p in r.providers if p.proven),
    )


def _is_vendors(found: wire.RuntimeFact, options: Sequence[RuntimeOption], python: str) -> bool:
    """Whether a proven runtime can only have come from the board's vendor."""
    same = [o for o in options if o.runtime == found.runtime]
    in_wheels = {name for o in same if o.requirements(python) for name in o.providers}
    from_system = {name for o in same if o.system for name in o.providers}
    return any(p.proven and p.name in from_system - in_wheels for p in found.providers)


@dataclass(frozen=True)
class Prepared:
    """Everything that provisioning would do. ``house`` and ``request`` are None where the environment asked for is there and
    works.

    ``missing``: digests of wheels that the device has neither installed nor received, ``send_bytes`` of them; ``free_bytes`` on
    its disk; ``signs`` is false where the signer is new to it.
    """

    plan: ProvisionPlan
    platform: WheelPlatform
    house: Wheelhouse | None
    request: wire.EnvironmentRequest | None
    missing: tuple[str, ...]
    send_bytes: int
    free_bytes: int
    signs: bool


def prepare(
    agent: Agent, target: str, profile: Profile, facts: wire.Facts, signer_line: str, wishes: Wishes, progress: Progress
) -> Prepared:
    """Find out what there is to do, resolving wheels where something is; changes nothing on the device."""
    plan = plan_provision(target, profile, facts, wishes.with_pillow)
    platform = platform_of(target, facts)
    signs = signer_line in agent.signers()
    works = any(p.proven for r in facts.runtimes for p in r.providers)
    found = facts.environment
    same = found is not None and (set(found.requirements), found.system_site) == (set(plan.requirements), plan.system_site)
    there = Prepared(plan, platform, None, None, (), 0, facts.disk_free_mb * 10**6, signs)
    if same and works and not wishes.upgrade and wishes.wheelhouse is None:
        return there
    try:
        plan, house = _resolve_plan(target, profile, plan, platform, wishes, progress)
    except IndexUnreachable:
        lacking = _lacking(plan, found) if works and not wishes.upgrade else None
        if not lacking:
            raise
        # What was left out for want of a wheel would be left out again, or cannot be had now: what is there goes on.
        for runtime in lacking:
            plan = plan.without_runtime(runtime, "it is not there, and the package index does not answer")
        return replace(there, plan=plan)
    request = wire.EnvironmentRequest(
        requirements=plan.requirements,
        system_site=plan.system_site,
        wheels=tuple(wire.Wheel(w.filename, w.sha256, w.size) for w in house.wheels),
        unpacked_bytes=0,
        keep=plan.keep,
        fresh=found is not None and not works,
    )
    added = {w.sha256: wire.Blob(w.sha256, w.size) for w in request.beyond(found)}
    unpacked = sum(w.unpacked for w in house.wheels if w.sha256 in added and w.package != "pip")
    have = agent.have(added.values())
    send = sum(b.size - have.partial.get(b.sha256, 0) for b in added.values() if b.sha256 in have.missing)
    request = replace(request, unpacked_bytes=unpacked)
    return Prepared(plan, platform, house, request, have.missing, send, have.free_bytes, signs)


def _lacking(plan: ProvisionPlan, found: wire.Environment | None) -> list[str] | None:
    """The runtimes alone by which an environment falls short of a plan; None where it falls short in something else."""
    if found is None or found.system_site != plan.system_site or not set(plan.extras) <= set(found.requirements):
        return None
    lacking = [runtime for runtime, group in plan.groups if not set(group) <= set(found.requirements)]
    return lacking if len(lacking) < len(plan.runtimes) else None


def _resolve_plan(
    target: str, profile: Profile, plan: ProvisionPlan, platform: WheelPlatform, wishes: Wishes, progress: Progress
) -> tuple[ProvisionPlan, Wheelhouse]:
    """The wheels of a plan, less the runtimes that have none for this device. NotProvisioned where none remains."""
    cache = Cache()
    key = f"{target}: wheels"
    source = PipIndex(cache, wishes.wheelhouse, key)

    def wheels(one: ProvisionPlan) -> Wheelhouse:
        if not one.requirements:
            return Wheelhouse(())
        roots = ("pip", *one.requirements)
        if wishes.wheelhouse is not None:
            return resolve(roots, platform, source, dict(one.given), progress)
        return resolve_remembered(roots, platform, source, dict(one.given), progress, cache=cache, upgrade=wishes.upgrade)

    progress.start(key, f"{key} for {platform}")
    try:
        try:
            return plan, wheels(plan)
        except NoWheel as e:
            return _leave_out(target, profile, plan, wheels, e)
    finally:
        progress.finish(key)


def _leave_out(
    target: str, profile: Profile, plan: ProvisionPlan, wheels: Callable[[ProvisionPlan], Wheelhouse], first: NoWheel
) -> tuple[ProvisionPlan, Wheelhouse]:
    """Add the runtimes one after the other, in the profile's order, leaving out those that lack a wheel."""
    kept, hint = replace(plan, groups=()), first.hint
    house = wheels(kept)
    for runtime, group in plan.groups:
        try:
            house = wheels(replace(kept, groups=(*kept.groups, (runtime, group))))
        except NoWheel as e:
            plan, hint = plan.without_runtime(runtime, str(e)), hint or e.hint
        else:
            kept = replace(kept, groups=(*kept.groups, (runtime, group)))
    if not plan.runtimes:
        raise NotProvisioned(
            f"{target}: no runtime of {profile.name} can be had: {'; '.join(plan.without)}",
            hint=hint or profile.python_hint or f"edgevit profiles show {profile.name}",
        )
    return plan, house


def provision_target(
    agent: Agent, target: str, prepared: Prepared, signer_line: str, progress: Progress
) -> tuple[wire.Facts, Provisioned]:
    """Let ``signer_line`` sign, do what was prepared, and return what the device has then. Harmless to repeat.

    NotProvisioned where no runtime passed an inference afterwards.
    """
    agent.allow([signer_line])
    done = Provisioned(False, 0)
    if prepared.request is not None and prepared.house is not None:
        files = {w.sha256: w.path for w in prepared.house.wheels}
        try:
            done = agent.provision(prepared.request, files, progress)
        except NotProvisioned as e:
            if e.hint != f"edgevit target provision {target}":
                raise
            raise NotProvisioned(str(e), hint=f"edgevit target probe {target}") from e  # what failed is this very command
    now = agent.probe()
    if not any(p.proven for r in now.runtimes for p in r.providers):
        detail = "; ".join(f"{k}: {v}" for k, v in now.absent.items() if k in wire.RUNTIMES) or "none was found"
        raise NotProvisioned(
            f"{target}: no runtime works there after provisioning: {detail}", hint=f"edgevit target probe {target}"
        )
    return now, done
