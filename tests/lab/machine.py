"""An emulated arm64 machine: Debian with systemd and sshd under qemu, its disk made once and copied for each use.

Latency there says nothing about any board. What it proves: real aarch64 wheels, a real systemd, real power cuts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDED = {
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-aarch64-static": "qemu-user-static",
    "debootstrap": "debootstrap",
    "mke2fs": "e2fsprogs",
    "ssh": "openssh-client",
}
PACKAGES = (
    "systemd-sysv,dbus,libpam-systemd,openssh-server,python3,sudo,iproute2,linux-image-cloud-arm64,initramfs-tools,kmod,udev"
)
SUITE = "bookworm"
USER = "pi"
BOOT_S = 300.0
BINFMT = Path("/proc/sys/fs/binfmt_misc")
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"


class LabError(Exception):
    """The laboratory itself does not work; nothing was proven either way."""


def check_tools() -> None:
    """Raises :class:`LabError` naming every package that is missing."""
    missing = sorted(package for program, package in NEEDED.items() if shutil.which(program) is None)
    if missing:
        raise LabError("missing: sudo apt install " + " ".join(missing))
    if os.geteuid() != 0:
        raise LabError("debootstrap and foreign chroots need root: sudo make lab")


def make_disk(folder: Path, mirror: str) -> None:
    """``disk.img``, ``vmlinuz``, ``initrd`` and ``key`` under ``folder``; minutes the first time, nothing afterwards."""
    if (folder / "disk.img").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key").exists():
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")])
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    _register_arm64()
    _run(["debootstrap", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), mirror])
    (root / "etc/hostname").write_text("edgevit-lab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost edgevit-lab\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (root / "etc/systemd/network/10-lab.network").write_text("[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n")
    _run(["chroot", str(root), "useradd", "--create-home", "--shell", "/bin/bash", USER])
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text((folder / "key.pub").read_text())
    _run(["chroot", str(root), "chown", "-R", f"{USER}:{USER}", f"/home/{USER}/.ssh"])
    sudoers = root / "etc/sudoers.d" / USER
    sudoers.write_text(f"{USER} ALL=(ALL) NOPASSWD:ALL\n")
    sudoers.chmod(0o440)
    _run(["chroot", str(root), "systemctl", "enable", "systemd-networkd", "ssh"])
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        shutil.copy(next((root / "boot").glob(pattern)), folder / name)
    _run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(folder / "disk.part"), "3G"])
    (folder / "disk.part").rename(folder / "disk.img")
    shutil.rmtree(root)


def _register_arm64() -> None:
    """Let the kernel start arm64 programs through qemu; with flag F it is open already, so chroots need no copy."""
    if not (BINFMT / "register").exists():
        _run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)])
    if not (BINFMT / "qemu-aarch64").exists():
        line = f":qemu-aarch64:M::{_MAGIC}:{_MASK}:{shutil.which('qemu-aarch64-static')}:F"
        (BINFMT / "register").write_text(line)


@dataclass
class Machine:
    """One machine with a disk of its own. ``port`` of 127.0.0.1 leads to its sshd."""

    folder: Path
    disk: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> Path:
        return self.folder / "key"

    def boot(self) -> float:
        """Start it and wait for a login; the seconds it took."""
        began = time.monotonic()
        log = (self.disk.parent / "console.log").open("ab")
        self.process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        while time.monotonic() - began < BOOT_S:
            if self.process.poll() is not None:
                break
            if self.shell("true", check=False).returncode == 0:
                return time.monotonic() - began
            time.sleep(1)
        tail = (self.disk.parent / "console.log").read_bytes()[-2000:].decode("utf-8", "replace")
        status = self.process.poll()
        what = f"gave no login within {BOOT_S:.0f} s" if status is None else f"ended with status {status}, without a login"
        raise LabError(f"the machine {what}:\n{tail}")

    def command(self) -> list[str]:
        """Its network leads nowhere but from ``port`` in."""
        return [
            *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1500", "-nographic", "-no-reboot"),
            *("-kernel", str(self.folder / "vmlinuz"), "-initrd", str(self.folder / "initrd")),
            *("-append", "root=/dev/vda rw console=ttyAMA0 net.ifnames=0"),
            *("-drive", f"file={self.disk},format=raw,if=virtio,cache=writethrough"),
            *("-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{self.port}-:22,restrict=on"),
            # It boots from the kernel given here: no network boot, whose program is a package of its own.
            *("-device", "virtio-net-pci,netdev=n,romfile="),
        ]

    def cut_power(self) -> None:
        """As pulling the plug: nothing in the machine is told."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def shell(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it as its user."""
        options = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        options += ["-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR", "-p", str(self.port), "-i", str(self.key)]
        done = subprocess.run(
            ["ssh", *options, f"{USER}@127.0.0.1", command], capture_output=True, text=True, timeout=120, check=False
        )
        if check and done.returncode != 0:
            raise LabError(f"{command}: status {done.returncode}: {done.stderr.strip()}")
        return done

    def fingerprint(self) -> str:
        """Of its ed25519 host key, asked of the machine itself."""
        said = self.shell("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout
        return said.split()[1]


@contextlib.contextmanager
def running_machine(folder: Path, scratch: Path) -> Iterator[Machine]:
    """A freshly installed machine, booted; gone afterwards."""
    disk = scratch / "disk.img"
    _run(["cp", "--sparse=always", "--reflink=auto", str(folder / "disk.img"), str(disk)])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    machine = Machine(folder, disk, port)
    try:
        yield machine
    finally:
        machine.cut_power()


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(list(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
