"""A fleet on one machine: one sshd per network namespace, real agents, an ordinary account (root only).

    python benchmarks/fleet.py [--devices 32] [--megabytes 50] [--rate 20] [--skip-bench] [--skip-deploy] [--keep DIR]

Measured: (1) `edgevit bench` of the demo bundle with the quick plan, which ships it first, to one device and to all of them:
seconds, the host's peak memory, and how many runs are VALID (they share this machine's CPUs, so many are rightly INVALID);
(2) `edgevit deploy` of a bundle of random bytes to one device and to all of them, each behind a link of its own that
is limited to --rate Mbit/s: the ratio of the times; (3) the host's peak memory of `edgevit fleet check`. The
devices' own work (sshd, agent) is done by the same CPUs here: its CPU seconds are what a rack of boards would take off them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgevit.fleet.connect import connect, trust  # noqa: E402
from edgevit.fleet.inventory import add_target  # noqa: E402
from edgevit.places import config_dir, fleet_path  # noqa: E402
from edgevit.schedule import over_targets  # noqa: E402
from edgevit.transport.prompts import NoPrompts  # noqa: E402
from tests.support import agent_bundle as tiny  # noqa: E402
from tests.support.fleet import Device, Runtime, namespaces_absent, running_device  # noqa: E402
from tests.support.sshd import test_account  # noqa: E402

GOAL = 1.3
GOAL_MB = 300


@dataclass(frozen=True)
class Done:
    """One command: wall seconds, the host process's own CPU seconds and peak memory in MB, its exit status, its document."""

    seconds: float
    cpu_s: float
    peak_mb: float
    status: int
    document: dict[str, Any]


COMMAND = """
import re, sys, time
from pathlib import Path
from edgevit.cli import run_cli
code = run_cli(sys.argv[2:])
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
Path(sys.argv[1]).write_text(f"{peak[1]} {time.process_time()}")
sys.exit(code)
"""


def edgevit(*words: str) -> Done:
    with tempfile.NamedTemporaryFile("r") as peak:
        argv = [sys.executable, "-c", COMMAND, peak.name, *words, "--json"]
        began = time.monotonic()
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        seconds = time.monotonic() - began
        document = json.loads(done.stdout) if done.stdout.strip() else {}
        peak_kb, cpu_s = peak.read().split()
        return Done(seconds, float(cpu_s), int(peak_kb) * 1024 / 1e6, done.returncode, document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--rate", type=int, default=20, metavar="MBIT")
    parser.add_argument("--at-once", type=int, default=0, help="of deploy; default: all")
    parser.add_argument("--skip-bench", action="store_true")
    parser.add_argument("--skip-deploy", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the demo's bundles here for the next time")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if absent := namespaces_absent():
        print(f"one sshd per network namespace is not possible here: {absent}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"devices": given.devices, "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="edgevit-fleet-") as folder, test_account() as account:
        os.environ["EDGEVIT_HOME"] = str(Path(folder) / "home")
        signer = tiny.make_signer(config_dir(), "signing_key")
        runtime = Runtime(account)
        with ExitStack() as opened:
            fleet = [opened.enter_context(running_device(account, number)) for number in range(given.devices)]
            prepare(fleet, runtime, signer, prove=not (given.skip_bench and given.skip_deploy))
            result["check"] = measure_check(given.devices)
            if not given.skip_bench:
                result["bench"] = measure_bench(given.keep or Path(folder), fleet)
            if not given.skip_deploy:
                for device in fleet:
                    device.limit(f"{given.rate}mbit")
                at_once = given.at_once or given.devices
                result["deploy"] = measure_deploy(Path(folder), fleet, signer, int(given.megabytes * 1e6), at_once)
                result["deploy"]["rate_mbit"] = given.rate
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return report(result)


def prepare(fleet: list[Device], runtime: Runtime, signer: tiny.Signer, *, prove: bool) -> None:
    """Every device in the fleet file under the tag ``fleet``, trusted, with a runtime (proven if asked), its signer known."""
    by_name = {device.target.name: device for device in fleet}
    for device in fleet:
        runtime.lend(device)
        add_target(fleet_path(), device.target.model_copy(update={"tags": ("fleet",), "profile": "generic-x86-64"}))

    def one(name: str) -> None:
        trust(by_name[name].target, NoPrompts(), by_name[name].server.fingerprint)
        with connect(by_name[name].target, NoPrompts()) as agent:
            agent.allow([signer.line()], replace=True)
            if prove:
                agent.probe()

    _, failed = over_targets(list(by_name), one, at_once=8)
    if failed:
        raise failed[0][1]


def measure_check(count: int) -> dict[str, Any]:
    """All connections at once."""
    done = edgevit("fleet", "check", "tag:fleet", "--at-once", str(count))
    reached = sum(row["error"] is None for row in done.document["targets"])
    return {"seconds": round(done.seconds, 1), "peak_mb": round(done.peak_mb), "reached": reached, "of": count}


def measure_bench(folder: Path, fleet: list[Device]) -> dict[str, Any]:
    """The demo's int8 bundle, shipped and measured by one command: on one device, then on all."""
    from edgevit import demo, signing
    from edgevit.progress import Quiet

    bundle = folder / "bundles" / "int8-dynamic"
    if not bundle.is_dir():
        demo.build_digits(folder, Quiet(), ["local"])
    # One kept from another time was signed by that time's key.
    signature = signing.sign((bundle / "manifest.json").read_bytes(), signing.default_key_path())
    (bundle / "manifest.json.sig").write_bytes(signature)
    measured: dict[str, Any] = {}
    for what, wanted, count in (("one", fleet[0].target.name, 1), ("all", "tag:fleet", len(fleet))):
        done = edgevit("bench", str(bundle), wanted, "--plan", "quick", "--threads", "1")
        verdicts = [row["verdict"] for row in done.document.get("rows", [])]
        valid = sum(bool(v.get("valid")) if isinstance(v, dict) else v == "VALID" for v in verdicts)
        measured[what] = {
            "seconds": round(done.seconds, 1),
            "peak_mb": round(done.peak_mb),
            "status": done.status,
            "measurements": len(verdicts),
            "valid": valid,
            "expected": count * measured.get("one", {"measurements": len(verdicts)})["measurements"],
        }
    measured["ratio"] = round(measured["all"]["seconds"] / measured["one"]["seconds"], 2)
    return measured


def devices_cpu(fleet: list[Device]) -> float:
    """CPU seconds of all sshds and of what they started and saw end."""
    ticks = 0
    for device in fleet:
        fields = Path(f"/proc/{device.server.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(value) for value in fields[11:15])  # utime, stime, cutime, cstime of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_deploy(folder: Path, fleet: list[Device], signer: tiny.Signer, size: int, at_once: int) -> dict[str, Any]:
    """Each a bundle of its own, so that nothing is there already."""
    measured: dict[str, Any] = {"megabytes": size / 1e6, "at_once": at_once}
    for version, (what, wanted) in enumerate((("one", fleet[0].target.name), ("all", "tag:fleet")), 1):
        extra = json.dumps([random.Random(version).randbytes(size // 2).hex()]).encode()
        bundle = tiny.make_bundle(signer, version=version, extra_blob=extra).write(folder / f"deploy-{version}")
        before = devices_cpu(fleet)
        done = edgevit("deploy", str(bundle), wanted, "--at-once", str(at_once))
        measured[what] = {
            "seconds": round(done.seconds, 1),
            "host_cpu_s": round(done.cpu_s, 1),
            "devices_cpu_s": round(devices_cpu(fleet) - before, 1),
            "peak_mb": round(done.peak_mb),
            "status": done.status,
        }
    measured["ratio"] = round(measured["all"]["seconds"] / measured["one"]["seconds"], 2)
    return measured


def report(result: dict[str, Any]) -> int:
    """Lines for people; 1 where a goal is missed."""
    check = result["check"]
    print(
        f"fleet check, {check['of']} connections at once: {check['reached']} reached in {check['seconds']} s, host's peak "
        f"{check['peak_mb']} MB (goal ≤ {GOAL_MB})"
    )
    good = check["reached"] == check["of"] and check["peak_mb"] <= GOAL_MB
    if bench := result.get("bench"):
        one, many = bench["one"], bench["all"]
        print(
            f"ship and measure: 1 device {one['seconds']} s, {result['devices']} devices {many['seconds']} s "
            f"({bench['ratio']} ×), host's peak {many['peak_mb']} MB (goal ≤ {GOAL_MB}); "
            f"{many['valid']} of {many['measurements']} VALID"
        )
        good &= many["measurements"] == many["expected"] and many["status"] == 0 and many["peak_mb"] <= GOAL_MB
        # 32 devices on this few CPUs disturb each other: were all of them VALID, the verdicts would be worth nothing.
        good &= result["devices"] <= (result["cpus"] or 1) or many["valid"] < many["measurements"]
    if deploy := result.get("deploy"):
        print(
            f"deploy of {deploy['megabytes']:.0f} MB at {deploy['rate_mbit']} Mbit/s each: 1 device "
            f"{deploy['one']['seconds']} s, {result['devices']} devices {deploy['all']['seconds']} s, "
            f"ratio {deploy['ratio']} (goal ≤ {GOAL}); "
            f"CPU seconds of the host {deploy['all']['host_cpu_s']}, of the devices {deploy['all']['devices_cpu_s']}; "
            f"host's peak {deploy['all']['peak_mb']} MB"
        )
        good &= deploy["ratio"] <= GOAL and deploy["all"]["status"] == 0
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
