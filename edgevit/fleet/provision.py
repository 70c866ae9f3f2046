"""Provisioning: a private Python environment with the runtimes that fit, and who may sign for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_agents import wire
from edgevit.errors import NotProvisioned
from edgevit.fleet.agent import Agent
from edgevit.profile import Profile
from edgevit.profile_model import RuntimeOption
from edgevit.progress import Progress


@dataclass(frozen=True)
class ProvisionPlan:
    """``requirements`` for the device's own pip, so that markers and wheel tags are the device's; ``system_site``: the
    environment sees the system's packages, where a board's runtime comes from its vendor."""

    requirements: tuple[str, ...]
    system_site: bool
    runtimes: tuple[str, ...]
    without: tuple[str, ...]


def plan_provision(target: str, profile: Profile, facts: wire.Facts) -> ProvisionPlan:
    """Which pip requirements bring this board's runtimes to its Python. Pure.

    A runtime that the vendor's system brings and that is proven already is left alone. Facts do not tell a vendor's runtime
    from the wheel that an earlier provisioning installed; a proven provider that no wheel has does. NotProvisioned, naming
    what to install, where Python or ``ssh-keygen -Y`` is missing or no runtime is known for this Python.
    """
    if facts.ssh_keygen is None:
        why = facts.absent.get("ssh_keygen", "it has no ssh-keygen -Y")
        raise NotProvisioned(
            f"{target}: {why}; signatures cannot be verified there",
            hint="on the device: sudo apt install openssh-client (8.1 or newer)",
        )
    options = profile.options(facts.machine)
    vendors = {r.runtime for r in facts.runtimes if _is_vendors(r, options, facts.python)}
    requirements: dict[str, None] = {}
    runtimes: list[str] = []
    without: list[str] = []
    system_site = any(option.system for option in options)
    for option in options:
        wanted = option.requirements(facts.python)
        if option.runtime in vendors:
            runtimes.append(option.runtime)
        elif wanted:
            if option.runtime not in runtimes:
                requirements.update(dict.fromkeys(wanted))
            runtimes.append(option.runtime)
        else:
            source = option.system or f"no wheel is known for Python {facts.python}"
            without.append(f"{option.runtime}: {source}")
    if not runtimes:
        raise NotProvisioned(
            f"{target}: no runtime of {profile.name} is known for Python {facts.python} on {facts.machine}: "
            f"{'; '.join(without) or 'the profile has none for this machine'}",
            hint=profile.python_hint or f"edgevit profiles show {profile.name}",
        )
    return ProvisionPlan(tuple(requirements), system_site, tuple(dict.fromkeys(runtimes)), tuple(without))


def _is_vendors(found: wire.RuntimeFact, options: Sequence[RuntimeOption], python: str) -> bool:
    """Whether a proven runtime can only have come from the board's vendor."""
    same = [o for o in options if o.runtime == found.runtime]
    in_wheels = {name for o in same if o.requirements(python) for name in o.providers}
    from_system = {name for o in same if o.system for name in o.providers}
    return any(p.proven and p.name in from_system - in_wheels for p in found.providers)


def provision_target(
    agent: Agent, target: str, profile: Profile, facts: wire.Facts, signer_line: str, progress: Progress
) -> wire.Facts:
    """Let ``signer_line`` sign, make the environment, and return what the device has then. Harmless to repeat.

    NotProvisioned where no runtime passed an inference afterwards.
    """
    plan = plan_provision(target, profile, facts)
    agent.allow([signer_line])
    agent.provision(plan.requirements, system_site=plan.system_site, progress=progress)
    now = agent.probe()
    if not any(p.proven for r in now.runtimes for p in r.providers):
        detail = "; ".join(f"{k}: {v}" for k, v in now.absent.items() if k in wire.RUNTIMES) or "none was found"
        raise NotProvisioned(
            f"{target}: no runtime works there after provisioning: {detail}", hint=f"edgevit target probe {target}"
        )
    return now
