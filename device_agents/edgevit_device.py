"""The active bundle of edgevit, for applications on this device. The agent puts a copy of this file at ROOT/python/.

In a program (the Python of ROOT/venv has the runtime; any other with numpy and that runtime will do):

    import os, sys
    sys.path.insert(0, os.path.expanduser("~/.edgevit/python"))
    from edgevit_device import load_active

As a program:

    python3 ~/.edgevit/python/edgevit_device.py active
    python3 ~/.edgevit/python/edgevit_device.py predict IMAGE...
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def _find_agent() -> str:
    """The agent's file, by its digest: while this process lives it reads this one, whatever is sent to the device meanwhile."""
    with open(os.path.join(ROOT, "python", "agent"), encoding="ascii") as f:
        sha256 = f.read().strip()
    path = os.path.join(ROOT, "agent", sha256 + ".pyz")
    try:
        with open(path, "rb") as f:
            whole = hashlib.sha256(f.read()).hexdigest() == sha256
    except OSError:
        whole = False
    if not whole:
        raise ImportError("{} is absent or damaged; on the host, edgevit target probe NAME sends it again".format(path))
    return path


def _enter_environment() -> None:
    """Go on in the provisioned environment, which has the runtime, where there is one and this is not it."""
    folder = os.path.join(ROOT, "venv")
    python = os.path.join(folder, "bin", "python")
    if os.path.exists(python) and os.path.realpath(sys.prefix) != os.path.realpath(folder):
        os.execv(python, [python, os.path.abspath(__file__)] + sys.argv[1:])


def load_active(root: str = ROOT, automatic: bool = True) -> Any:
    """See device_agents.api.load_active."""
    from device_agents.api import load_active as load

    return load(root, automatic)


if __name__ == "__main__":
    _enter_environment()
sys.path.insert(0, _find_agent())

if __name__ == "__main__":
    from device_agents.on_device import main

    sys.exit(main(ROOT, sys.argv[1:]))
else:
    from device_agents.errors import Refused as Refused
