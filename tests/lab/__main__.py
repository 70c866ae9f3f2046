"""`make lab`: the whole path on an emulated arm64 machine, by the commands a person types. Not part of `make test`.

The machine reaches no network: what it runs was resolved and sent by the host. Each line is one thing that held; the first that
does not ends the run with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.lab.machine import USER, LabError, Machine, check_tools, make_disk, running_machine
from tests.support.waiting import wait_for

HELD = ("unprivileged user", "no new privileges", "no capabilities", "system calls filtered", "system read-only")
HELD += ("homes read-only", "private /tmp", "kernel settings read-only", "no network")


class Failed(Exception):
    """Something edgevit promises did not hold."""


class Lab:
    """One home of an operator, one machine, and the commands between them."""

    def __init__(self, machine: Machine, scratch: Path) -> None:
        self.machine, self.scratch = machine, scratch
        self.env = {**os.environ, "EDGEVIT_HOME": str(scratch / "home"), "COLUMNS": "100"}
        self.began = time.monotonic()
        self.bundle = scratch / "bundle"

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)

    def edgevit(self, *words: str, status: int = 0) -> str:
        """A command's standard output; :class:`Failed` where it ends with another status."""
        done = subprocess.run(
            [sys.executable, "-m", "edgevit", *words], env=self.env, capture_output=True, text=True, timeout=1200, check=False
        )
        if done.returncode != status:
            raise Failed(f"edgevit {' '.join(words)}: status {done.returncode}, expected {status}:\n{done.stderr[-3000:]}")
        return done.stdout

    def document(self, *words: str) -> Any:
        return json.loads(self.edgevit(*words, "--json"))

    def work(self) -> None:
        self.say(f"booted in {self.machine.boot():.0f} s: {self.machine.shell('uname -srm').stdout.strip()}")
        self.provision()
        self.ship()
        self.daemon()
        self.power_cut()
        self.user_unit()
        self.leave_no_trace()

    def provision(self) -> None:
        machine = self.machine
        self.edgevit("key", "make")
        address = ["arm", f"{USER}@127.0.0.1", "--port", str(machine.port), "--key", str(machine.key)]
        self.edgevit("target", "add", *address, "--fingerprint", machine.fingerprint(), "--no-provision")
        if machine.shell("python3 -c 'import ensurepip'", check=False).returncode == 0:
            raise LabError("this machine has ensurepip: it does not stand for a board without")
        self.say(self.edgevit("target", "provision", "arm").strip() + "; no ensurepip, no network there")
        facts = self.document("target", "probe", "arm")["targets"][0]["facts"]
        proven = {r["runtime"]: r["version"] for r in facts["runtimes"] if any(p["proven"] for p in r["providers"])}
        expect(set(proven) == {"onnxruntime", "litert"} and facts["machine"] == "aarch64", f"proven runtimes: {proven}")
        self.say(f"proven by an inference: {proven}")
        again = self.edgevit("target", "provision", "arm", "--dry-run")
        expect("to send" not in again, f"a second provisioning would send again:\n{again}")

    def ship(self) -> None:
        build = ["edgevit.digits:digits_vit", "--random-weights", "--recipe", "int8-dynamic", "--for", "arm"]
        self.edgevit("build", *build, "-o", str(self.bundle))
        self.say(self.deploy()["text"])
        expect(not self.deploy()["changed"], "the second deploy sent something")
        self.check_batch(self.document("bench", str(self.bundle), "arm", "--plan", "quick"))

    def deploy(self) -> Any:
        return self.document("deploy", str(self.bundle), "arm")["targets"][0]

    def check_batch(self, document: Any) -> None:
        rows = {row["artifact"]: row for row in document["rows"]}
        expect(len(rows) == 2, f"expected both formats, got {sorted(rows)}")
        for name, row in rows.items():
            held = row["failure"] == "" and row["n"] > 0 and row["verdict"]["valid"]
            expect(held, f"{name}: {row['failure']}, {row['verdict']}")
        self.say(f"golden outputs of {' and '.join(sorted(rows))} hold on aarch64")

    def daemon(self) -> None:
        self.edgevit("target", "daemon", "install", "arm")
        status = self.status()
        expect(status["at_work"] and status["kind"] == "system", str(status))
        protections = status["state"]["protections"]
        missing = [name for name in HELD if protections[name] != "yes"]
        expect(not missing, f"these protections do not hold: {missing}")
        expect(status["resident_mb"] <= 20, f"{status['resident_mb']} MB resident")
        self.say(f"daemon as a system unit, {len(HELD)} protections hold, {status['resident_mb']:.1f} MB resident")
        begun, seconds = status["cpu_seconds"], 60
        time.sleep(seconds)
        spent = self.status()["cpu_seconds"] - begun
        self.say(f"idle for {seconds} s it took {spent:.2f} s of this emulated processor")

    def status(self) -> Any:
        return self.document("target", "daemon", "status", "arm")["targets"][0]["status"]

    def power_cut(self) -> None:
        """The plug is pulled in the middle of a detached job; after the next boot it is done, once."""
        run = self.document("bench", str(self.bundle), "arm", "--plan", "quick", "--detach")["runs"][0]["run"]
        begun = f'grep -q \'"unit":"series"\' .edgevit/spool/{run}.part'
        wait_for(lambda: self.machine.shell(begun, check=False).returncode == 0, "the job's first series by the daemon", 120)
        self.machine.cut_power()
        self.edgevit("collect", "arm", status=3)
        self.say(f"power cut in the middle of {run}; back in {self.machine.boot():.0f} s")
        said = self.edgevit("collect", "arm", "--wait")
        expect(said.count(run) == 1 and "completed" in said, f"after the power cut: {said}")
        expect("nothing waits" in self.edgevit("collect", "arm"), "a result came home twice")
        self.say(said.strip())
        verified = self.document("target", "probe", "arm")["targets"][0]["facts"]
        expect(verified["active"] is not None, "nothing is active after the power cut")
        expect(not self.deploy()["changed"], "the power cut cost blobs")

    def user_unit(self) -> None:
        self.edgevit("target", "daemon", "remove", "arm")
        expect(not self.status()["at_work"], "the daemon is still at work")
        self.edgevit("target", "daemon", "install", "arm", "--unit", "user")
        status = self.status()
        expect(status["at_work"] and status["kind"] == "user", str(status))
        held = [name for name, value in status["state"]["protections"].items() if value == "yes"]
        self.say(f"daemon as a user unit; these hold: {', '.join(held)}")
        self.check_batch(self.document("bench", str(self.bundle), "arm", "--plan", "quick"))

    def leave_no_trace(self) -> None:
        self.edgevit("target", "unprovision", "arm", "--yes")
        left = self.machine.shell(
            "ls -d ~/.edgevit ~/.config/systemd/user/edgevit* /etc/systemd/system/edgevit* 2>/dev/null", check=False
        ).stdout
        running = self.machine.shell("pgrep -fa edgevit || true").stdout
        expect(not left and "daemon" not in running, f"left behind: {left}{running}")
        self.say("unprovisioned: no file, no unit, no process is left")


def expect(held: bool, text: str) -> None:
    if not held:
        raise Failed(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap gets Debian from")
    parser.add_argument("--cache", type=Path, default=Path(".cache/lab"), help="where the installed disk is kept")
    a = parser.parse_args()
    try:
        check_tools()
        make_disk(a.cache.resolve(), a.mirror)
        with (
            tempfile.TemporaryDirectory(prefix="edgevit-lab-") as scratch,
            running_machine(a.cache.resolve(), Path(scratch)) as machine,
        ):
            Lab(machine, Path(scratch)).work()
    except LabError as e:
        print(f"the laboratory does not work: {e}", file=sys.stderr)
        return 2
    except Failed as e:
        print(f"FAILED: {e}", file=sys.stderr)
        return 1
    print("everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
