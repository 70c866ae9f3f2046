"""The daemon as a systemd unit file's text. Sources: systemd.unit(5), systemd.service(5), systemd.exec(5),
systemd.resource-control(5).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

WATCHDOG_S = 60


@dataclass(frozen=True)
class UnitSettings:
    """``user`` None: a user unit. ``groups`` are those of ``user`` besides its own; ``devices`` what the sensors need."""

    root: Path
    python: str
    agent_sha256: str
    unit: str
    user: Optional[str]
    groups: Tuple[str, ...]
    devices: Tuple[str, ...]
    quota_mb: Optional[int]
    shared: bool
    sandboxed: bool


def unit_name(root: Path) -> str:
    """One unit for each root of a device."""
    return "edgevit-agent-{}.service".format(hashlib.sha256(str(root).encode("utf-8")).hexdigest()[:8])


def render_unit(settings: UnitSettings) -> str:
    """The unit file's text. A user manager honours the sandbox only with ``PrivateUsers=``."""
    command = [settings.python, "-I", str(settings.root / "agent" / "launch.py"), settings.agent_sha256, str(settings.root)]
    command += ["daemon", "--unit", settings.unit]
    if settings.quota_mb is not None:
        command += ["--quota-mb", str(settings.quota_mb)]
    for device in settings.devices:
        command += ["--device", device]
    lines = [
        "[Unit]",
        "Description=edgevit agent: measures models from {}".format(_escape(str(settings.root))),
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "ExecStart=" + " ".join(_quote(_escape(word).replace("$", "$$")) for word in command),
        "Restart=always",
        "RestartSec=2",
        "WatchdogSec={}".format(WATCHDOG_S),
        "TimeoutStopSec=15",
        "UMask={}".format("0007" if settings.shared else "0077"),
    ]
    if settings.user is not None:
        lines.append("User={}".format(settings.user))
        if settings.groups:
            lines.append("SupplementaryGroups={}".format(" ".join(settings.groups)))
    lines += _sandbox(settings) if settings.sandboxed else ["NoNewPrivileges=yes"]
    lines += ["", "[Install]", "WantedBy={}".format("multi-user.target" if settings.user is not None else "default.target"), ""]
    return "\n".join(lines)


def _sandbox(settings: UnitSettings) -> List[str]:
    lines = [
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "ReadWritePaths={}".format(_quote(_escape(str(settings.root)))),
        "PrivateTmp=yes",
        "ProtectKernelTunables=yes",
        "ProtectControlGroups=yes",
        "RestrictAddressFamilies=AF_UNIX",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
    ]
    if settings.user is None:
        return lines + ["PrivateUsers=yes"]
    lines += [
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "IPAddressDeny=any",
    ]
    if settings.devices:
        lines.append("DevicePolicy=closed")
        lines += ["DeviceAllow={} rw".format(device) for device in settings.devices]
    else:
        lines.append("PrivateDevices=yes")
    return lines


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _quote(plain: str) -> str:
    """One word of a list, as systemd.syntax(7) reads it. Only command lines know variables, whose ``$`` is doubled before."""
    if plain and all(c.isalnum() or c in "/._-+=:,@%$" for c in plain):
        return plain
    return '"{}"'.format(plain.replace("\\", "\\\\").replace('"', '\\"'))
