"""What applications import: a copy of :mod:`device_agents.edgevit_device` at a path that stays, and which agent it starts."""

from __future__ import annotations

import os
from typing import Any

from device_agents.store import Store


def write_entry(store: Store, agent_sha256: str) -> None:
    """Make ``ROOT/python/`` speak for this agent, each file in one rename and only where it says something else.

    Comes before ``active.json`` is replaced: whoever reads the new one then has an agent that knows how.
    """
    loader: Any = globals()["__loader__"]
    text = bytes(loader.get_data(os.path.join(os.path.dirname(os.path.abspath(__file__)), "edgevit_device.py")))
    for path, data in ((store.entry_agent_path, agent_sha256.encode("ascii") + b"\n"), (store.entry_path, text)):
        if store.read(path, 1_000_000) != data:
            store.write(path, data)
