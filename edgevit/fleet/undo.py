"""Going back to what was active before, safely over links that break."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevit.errors import DeviceError, Pinned
from edgevit.fleet.deploy import describe
from edgevit.fleet.inventory import Target, pin_of
from edgevit.fleet.operator import Operator, holding

if TYPE_CHECKING:
    from device_agents.wire import Active, Facts, Variant
    from edgevit.fleet.agent import Agent


def go_back(agent: Agent, operator: Operator, undo: list[str], target: Target, *, take_over: bool, despite_pin: bool) -> Active:
    """Activate what was active before, once, however often this is called with the same ``undo``: it keeps when what is to be
    left was activated, as the device wrote it, from the first call on. Raises :class:`Pinned` where the pin would be left."""
    with holding(agent, operator, take_over=take_over):
        if not undo:
            facts = agent.probe(quick=True)
            if not despite_pin:
                _keep_pin(target, facts)
            undo.append(facts.active.activated_at if facts.active else "")
        return agent.rollback(undo[0])


def _keep_pin(target: Target, facts: Facts) -> None:
    if target.pin is None or facts.active is None or facts.previous is None:
        return
    now, then = (pin_of(a.bundle_name, a.bundle_version) for a in (facts.active, facts.previous))
    if now == target.pin != then:
        raise Pinned(
            f"{target.name} is pinned to {target.pin} in the fleet file, a rollback would make {then} active",
            hint=f"change its pin there, or this once: edgevit rollback {target.name} --despite-pin",
        )


def restore(agent: Agent, activated_at: str, wanted: Variant) -> Active:
    """Leave what was activated at ``activated_at``, and see that ``wanted`` is active then. DeviceError where it is not."""
    active = agent.rollback(activated_at)
    if active.variant != wanted:
        raise DeviceError(
            f"{agent.name}: after going back {describe(active.variant)} of {active.bundle_name} v{active.bundle_version} is "
            f"active, not {describe(wanted)} of the bundle {wanted.bundle[:12]} as before",
            hint=f"edgevit fleet status {agent.name}",
        )
    return active
