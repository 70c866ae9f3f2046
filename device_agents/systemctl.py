"""systemctl for one unit, of the system or of this user; root's part of it through ``sudo -n``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from shlex import quote
from typing import Optional, Sequence, Tuple

from device_agents.errors import Refused, printable
from device_agents.store import Store

SYSTEM_FOLDER = Path("/etc/systemd/system")


def has_systemd() -> bool:
    """Whether systemd runs this device (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def may_sudo() -> bool:
    return os.geteuid() == 0 or succeeds(["sudo", "-n", "true"])


class Manager:
    """systemctl of the system or of this user, for one unit."""

    def __init__(self, kind: str, unit: str) -> None:
        self.kind, self.unit = kind, unit
        if kind == "system":
            self._sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
            self._systemctl = ["systemctl"]
            self.path = SYSTEM_FOLDER / unit
        else:
            self._sudo = []
            self._systemctl = ["systemctl", "--user"]
            self.path = Path(os.path.expanduser("~/.config/systemd/user")) / unit

    def read(self) -> Optional[str]:
        """The unit that lies in its place; None where there is none that can be read."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def write(self, store: Store, text: str) -> None:
        """Put the unit in its place. ``needs-root`` with the commands where this user may not."""
        if self.kind == "user":
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            store.write(self.path, text.encode("utf-8"))
            return
        draft = store.root / self.unit
        store.write(draft, text.encode("utf-8"))
        commands = [
            ["install", "-m", "644", "-o", "root", "-g", "root", str(draft), str(self.path)],
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", self.unit],
            ["systemctl", "restart", self.unit],
        ]
        if not may_sudo():
            raise Refused(
                "needs-root",
                "a system unit needs root once, and sudo -n is refused here. On the device type:\n{}".format(
                    "\n".join("  sudo " + " ".join(map(quote, argv)) for argv in commands)
                ),
                "edgevit target daemon install … --unit user, or type the commands above and: edgevit target daemon status",
            )
        try:
            self._do(commands[0])
        finally:
            store.remove(draft)

    def restart(self, store: Store) -> None:
        for verb in (["daemon-reload"], ["enable", self.unit], ["reset-failed", self.unit], ["restart", self.unit]):
            if verb[0] == "reset-failed":
                succeeds(self._sudo + self._systemctl + verb)  # refused for a unit that never failed
            elif verb[0] == "restart":
                run(self._sudo + self._systemctl + verb)  # whether it came up is seen by the daemon itself
            else:
                self._do(self._systemctl + verb)

    def remove(self, store: Store) -> bool:
        if not os.path.lexists(str(self.path)):
            return False
        if self.kind == "system" and not may_sudo():
            commands = ["systemctl disable --now {}".format(self.unit), "rm {}".format(self.path), "systemctl daemon-reload"]
            raise Refused(
                "needs-root",
                "removing the system unit needs root, and sudo -n is refused here. On the device type:\n{}".format(
                    "\n".join("  sudo " + command for command in commands)
                ),
            )
        self._do(self._systemctl + ["disable", "--now", self.unit])
        self._do(["rm", "-f", str(self.path)])
        self._do(self._systemctl + ["daemon-reload"])
        return True

    def state(self) -> str:
        """Such as ``active (running), enabled``; ``absent`` where there is no such unit."""
        if not os.path.lexists(str(self.path)):
            return "absent"
        code, said = run(self._systemctl + ["show", self.unit, "-p", "ActiveState,SubState,UnitFileState,NRestarts"])
        if code != 0:
            return "unknown: {}".format(said)[:200]
        fields = dict(line.partition("=")[::2] for line in said.splitlines())
        return "{} ({}), {}, restarted {} ×".format(
            *(fields.get(k, "?") for k in ("ActiveState", "SubState", "UnitFileState", "NRestarts"))
        )[:200]

    def log_tail(self) -> str:
        return "{}\n{}".format(
            self.state(), run(self._sudo + self._systemctl + ["status", "--no-pager", "--lines", "20", self.unit])[1][-3000:]
        )

    def _do(self, argv: Sequence[str]) -> None:
        code, said = run(self._sudo + list(argv))
        if code != 0:
            raise Refused("no-systemd", "{} ended with status {}: {}".format(" ".join(argv), code, said[-2000:]))


def succeeds(argv: Sequence[str]) -> bool:
    return run(argv)[0] == 0


def run(argv: Sequence[str]) -> Tuple[int, str]:
    """(status, what it said); 127 where there is no such program. A user manager is found without a login session's help."""
    env = dict(os.environ, LC_ALL="C", SYSTEMD_COLORS="0")
    env.setdefault("XDG_RUNTIME_DIR", "/run/user/{}".format(os.geteuid()))
    try:
        done = subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, env=env, cwd="/"
        )
    except FileNotFoundError:
        return 127, "there is no {}".format(argv[0])
    except (OSError, subprocess.TimeoutExpired) as e:
        return 126, str(e)
    return done.returncode, printable(done.stdout.decode("utf-8", "replace")).strip()
