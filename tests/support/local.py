"""What the agent behind the ``local`` target holds."""

from __future__ import annotations

from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import local_target
from edgevit.transport.prompts import NoPrompts


def installed_locally() -> list[str]:
    """Digests of the bundles that are installed there."""
    with connect(local_target(), NoPrompts()) as agent:
        return [installed.bundle for installed in agent.probe().bundles]
