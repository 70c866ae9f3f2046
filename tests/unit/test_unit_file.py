"""The daemon's unit file, held against systemd's own reader, and what a process finds out about its protections."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from device_agents import service, systemctl
from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.protections import find_protections, is_read_only, parse_mountinfo
from device_agents.store import Store
from device_agents.unit import UnitSettings, render_unit, unit_name

SETTINGS = UnitSettings(
    root=Path("/var/lib/edgevit"),
    python="/usr/bin/python3",
    agent_sha256="a" * 64,
    unit="edgevit-agent-12345678.service",
    user="root",
    groups=(),
    devices=(),
    quota_mb=None,
    shared=False,
    sandboxed=True,
)

CASES = {
    "plain": SETTINGS,
    "another user, shared, with devices": replace(
        SETTINGS, shared=True, groups=("video",), devices=("/dev/null", "/dev/zero"), quota_mb=500
    ),
    "user unit": replace(SETTINGS, user=None),
    "user unit without a sandbox": replace(SETTINGS, user=None, sandboxed=False),
    "a root with spaces and signs": replace(SETTINGS, root=Path('/srv/ed ge%vit$HOME/a"b\\c')),
}


@pytest.mark.parametrize("name", CASES)
def test_systemd_reads_the_unit_without_a_complaint(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("this test needs systemd's own reader: sudo apt install systemd")
    settings = CASES[name]
    path = tmp_path / settings.unit
    path.write_text(render_unit(settings))
    done = subprocess.run(
        ["systemd-analyze", "verify", *(["--user"] if settings.user is None else []), "--recursive-errors=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about_it = [line for line in done.stderr.splitlines() if settings.unit in line]
    assert about_it == [], "\n".join(about_it)


def test_words_reach_the_daemon_as_they_are() -> None:
    """systemd.service(5): % and $ are doubled, quotes and backslashes escaped."""
    lines = render_unit(CASES["a root with spaces and signs"]).splitlines()
    command = next(line for line in lines if line.startswith("ExecStart="))
    assert '"/srv/ed ge%%vit$$HOME/a\\"b\\\\c"' in command
    assert 'ReadWritePaths="/srv/ed ge%%vit$HOME/a\\"b\\\\c"' in lines, "no variables stand there, so nothing is doubled"


def test_commands_that_a_person_is_to_type_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "a root; of 5%")
    store.create()
    monkeypatch.setattr(systemctl, "may_sudo", lambda: False)
    monkeypatch.setattr(service, "has_systemd", lambda: False)
    with pytest.raises(Refused) as unit:
        systemctl.Manager("system", "e.service").write(store, "[Unit]\n")
    line = next(line for line in str(unit.value).splitlines() if "install" in line)
    assert str(store.root / "e.service") in shlex.split(line)
    with pytest.raises(Refused) as nothing:
        service._check_systemd(store, "a" * 64)
    entry = nothing.value.hint.partition("@reboot ")[2]
    assert re.search(r"(?<!\\)%", entry) is None, "crontab ends the command there"
    assert shlex.split(entry.replace("\\%", "%"))[2:5] == [str(store.launch_path), "a" * 64, str(store.root)]
    assert shlex.split(service.share_commands(str(store.root), "pi", "edgevit")[2])[-1] == str(store.root)


class Units:
    """Stands in for systemd, where no unit ever comes up."""

    there: ClassVar[dict[str, str]] = {}
    started: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, kind: str, unit: str) -> None:
        self.kind, self.unit = kind, unit

    def read(self) -> str | None:
        return self.there.get(self.kind)

    def write(self, store: Store, text: str) -> None:
        self.there[self.kind] = text

    def restart(self, store: Store) -> None:
        self.started.append((self.kind, self.there[self.kind]))

    def remove(self, store: Store) -> bool:
        return self.there.pop(self.kind, None) is not None

    def state(self) -> str:
        return "failed"

    def log_tail(self) -> str:
        return "its log"


@pytest.mark.parametrize("before", [{}, {"system": "an older unit"}, {"user": "the other kind"}])
def test_a_unit_that_does_not_come_up_leaves_what_was_there(
    before: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be started every two seconds for good, and the daemon that was at work would be gone."""
    Units.there, Units.started = dict(before), []
    monkeypatch.setattr(service, "Manager", Units)
    monkeypatch.setattr(service, "_check_systemd", lambda *_: None)
    monkeypatch.setattr(service, "launcher_text", lambda: "")
    monkeypatch.setattr(service, "STARTS_WITHIN_S", 0.0)
    request = {"kind": "system", "user": None, "groups": [], "devices": [], "quota_mb": None}
    asked = tmp_path / "asked"
    asked.write_text(json.dumps(request))
    with (
        asked.open("rb") as source,
        open(os.devnull, "wb") as sink,
        pytest.raises(Refused, match="does not come up") as refused,
    ):
        service.install_daemon(Store(tmp_path / "root"), Console(source.fileno(), sink.fileno()), "a" * 64)
    assert refused.value.code == "no-daemon" and "its log" in str(refused.value)
    assert Units.there == before and Units.started[1:] == list(before.items()), "what was at work is at work again"


def test_what_the_settings_ask_for_is_in_the_unit() -> None:
    text = render_unit(CASES["another user, shared, with devices"])
    for line in ("UMask=0007", "SupplementaryGroups=video", "DevicePolicy=closed", "DeviceAllow=/dev/zero rw", "User=root"):
        assert line in text.splitlines()
    assert "--quota-mb 500" in text and "--device /dev/null" in text
    assert "PrivateDevices=yes" not in text
    plain = render_unit(SETTINGS).splitlines()
    assert {"PrivateDevices=yes", "UMask=0077", "ProtectSystem=strict", "WantedBy=multi-user.target"} <= set(plain)
    user = render_unit(CASES["user unit"]).splitlines()
    assert "PrivateUsers=yes" in user and "WantedBy=default.target" in user and not any(u.startswith("User=") for u in user)


def test_each_root_has_its_unit() -> None:
    assert unit_name(Path("/a")) != unit_name(Path("/b"))
    assert unit_name(Path("/a")) == unit_name(Path("/a"))


MOUNTINFO = """\
22 1 179:2 / / ro,noatime shared:1 - ext4 /dev/root rw
23 22 0:20 / /proc rw,nosuid - proc proc rw
24 23 0:20 /sys /proc/sys ro,nosuid - proc proc rw
25 22 179:2 /var/lib/edge\\040vit /var/lib/edge\\040vit rw,noatime - ext4 /dev/root rw
26 22 179:2 /home /home ro,noatime - ext4 /dev/root rw
27 22 179:2 /tmp/systemd-private-abc-edgevit.service-x/tmp /tmp rw - ext4 /dev/root rw
28 26 179:2 /home/pi/agent /home/pi/agent rw - ext4 /dev/root rw
"""
STATUS = "Name:\tpython3\nUid:\t998\t998\t998\t998\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n"


def test_what_the_kernel_shows_a_sandboxed_process(tmp_path: Path) -> None:
    """Recorded shapes of /proc as systemd's own documentation and proc(5) describe them."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(STATUS)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTINFO)
    (tmp_path / "proc/cgroups").write_text("#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t60\t0\n")
    found = find_protections(tmp_path, Path("/var/lib/edge vit"), ("/dev/null", "/dev/not-there"))
    for name in (
        "unprivileged user",
        "no new privileges",
        "no capabilities",
        "system calls filtered",
        "system read-only",
        "homes read-only",
        "private /tmp",
        "kernel settings read-only",
        "device /dev/null",
    ):
        assert found[name] == "yes", name
    assert found["memory cgroup"].startswith("off in this kernel")
    assert found["device /dev/not-there"] == "absent"
    assert "store" not in found, "its root is writable"
    assert find_protections(tmp_path, Path("/srv/agent"), ())["store"].startswith("read-only")


def test_the_innermost_and_the_latest_mount_counts() -> None:
    mounts = parse_mountinfo(MOUNTINFO + "29 28 179:2 /x /home/pi/agent ro - ext4 /dev/root rw\n")
    assert is_read_only(mounts, "/home/pi/other") is True
    assert is_read_only(mounts, "/var/lib/edge vit/queue") is False
    assert is_read_only(mounts, "/home/pi/agent/queue") is True, "the later mount hides the earlier"
    assert is_read_only(mounts, "/home/pi/agentx") is True
    assert is_read_only([], "/usr") is None


def test_nothing_readable_is_unknown_or_no(tmp_path: Path) -> None:
    found = find_protections(tmp_path, Path("/srv"), ())
    assert found["system read-only"] == found["no capabilities"] == "unknown"
    assert found["no new privileges"] == found["private /tmp"] == "no"
