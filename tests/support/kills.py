"""`kill -9` of host or agent at seeded random moments of real deploys and benches, and what must hold after.

After every kill the active bundle verifies on the device; at the end every run the device ever accepted is in the store, once.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from edgevit import signing
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import local_target
from edgevit.fleet.operator import holding, this_operator
from edgevit.results.store import Store
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import Signer, make_bundle
from tests.support.processes import find_agents, kill

COMMAND_LIMIT_S = 180.0


@dataclass
class Tally:
    """What happened; ``problems`` must be empty."""

    trials: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    done_before: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        kills = ", ".join(f"{n} × {what}" for what, n in sorted(self.killed.items()))
        return (
            f"{self.trials} trials: killed {kills or 'nothing'}; {self.done_before} ended before the kill; "
            f"{self.runs} runs came home"
        )


class Trials:
    """A home with a signing key, two versions of one bundle, and the ``local`` agent with the first of them active."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.home = folder / "home"
        self.root = self.home / "data" / "local-agent"
        self.env = {**os.environ, "EDGEVIT_HOME": str(self.home)}
        self.tally = Tally()
        self.seen: set[str] = set()
        key = self.home / "config" / "signing_key"
        key.parent.mkdir(parents=True)
        signing.make_key(key, "kills")
        self.bundles = [
            make_bundle(Signer(key), version=version, extra_blob=f'["{version}"]'.encode() + b" " * 2_000_000).write(
                folder / f"v{version}"
            )
            for version in (1, 2)
        ]
        self.time_command("deploy", self.bundles[0])
        # How long each command takes when nobody is killed and the runtimes are proven: the moments are drawn over that time.
        self.usual_s = {what: self.time_command(what, self.bundles[1]) for what in ("deploy", "bench")}

    def command(self, *argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "edgevit", *argv],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @staticmethod
    def argv(what: str, bundle: Path) -> list[str]:
        return [what, str(bundle), "local", *(["--allow-older"] if what == "deploy" else ["--plan", "quick"])]

    def time_command(self, what: str, bundle: Path) -> float:
        began = time.monotonic()
        status = self.command(*self.argv(what, bundle)).wait(COMMAND_LIMIT_S)
        if status != 0:
            self.problem(f"{what} ended with {status} though nobody was killed")
        return time.monotonic() - began

    def one(self) -> None:
        """Start a command, kill somebody at a random moment, check."""
        what = self.random.choice(["deploy", "bench"])
        victim = self.random.choice(["host", "agent"])
        process = self.command(*self.argv(what, self.random.choice(self.bundles)))
        deadline = time.monotonic() + self.random.uniform(0.2, 0.8) * self.usual_s[what]
        while process.poll() is None and (time.monotonic() < deadline or (victim == "agent" and not find_agents(self.root))):
            self.note_runs()
            time.sleep(0.005)
        self.tally.trials += 1
        if process.poll() is not None:
            self.tally.done_before += 1
        elif victim == "host":
            process.kill()
            self.tally.killed[f"host in {what}"] += 1
        else:
            self.tally.killed[f"agent in {what}"] += bool(kill(find_agents(self.root)))
        try:
            process.wait(COMMAND_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self.problem(f"{what} hung after the {victim} was killed")
        self.note_runs()
        self.check_active()

    def note_runs(self) -> None:
        """Every run the device has accepted, from what lies in its queue and spool."""
        for folder in ("queue", "spool"):
            with contextlib.suppress(OSError):
                self.seen.update(
                    p.name.split(".")[0]
                    for p in (self.root / folder).iterdir()
                    if p.suffix in (".json", ".part", ".run", ".acked")
                )

    def check_active(self) -> None:
        """Activating what is active makes the device verify signature and every digest once more. An agent whose host was
        killed may still be activating another: then what is active changes once more in between."""
        with connect(local_target(), NoPrompts()) as agent, holding(agent, this_operator("kill trials")):
            for _ in range(3):
                active = agent.probe(quick=True).active
                if active is None:
                    self.problem("no bundle is active any more")
                    return
                if not agent.activate(active.variant, active.policy).changed:
                    return
            self.problem("activating the active variant changes something again and again")

    def problem(self, text: str) -> None:
        self.tally.problems.append(f"trial {self.tally.trials}: {text}")

    def finish(self) -> Tally:
        """Bring everything home; every accepted run is in the store once, and nothing waits."""
        collected = self.command("collect", "local", "--wait").wait(COMMAND_LIMIT_S)
        if collected != 0:
            self.problem(f"edgevit collect ended with {collected}")
        self.note_runs()
        with Store(f"sqlite:///{self.home / 'data' / 'results.sqlite'}") as store:
            stored = Counter(run.job.run_id for run in store.runs())
        self.tally.runs = len(stored)
        self.tally.problems += [
            f"run {run_id} was accepted by the device and is lost" for run_id in sorted(self.seen - set(stored))
        ]
        self.tally.problems += [f"run {run_id} is in the store {n} times" for run_id, n in stored.items() if n != 1]
        with connect(local_target(), NoPrompts()) as agent:
            self.tally.problems += [f"{w.run_id} still waits ({w.state})" for w in agent.waiting()]
        return self.tally


def run_trials(folder: Path, seed: int, count: int) -> Tally:
    """Trials in ``folder`` until ``count`` of them killed somebody. Meanwhile EDGEVIT_HOME of this process is their home."""
    trials = Trials(folder, seed)
    before = os.environ.get("EDGEVIT_HOME")
    os.environ["EDGEVIT_HOME"] = str(trials.home)
    try:
        while trials.tally.killed.total() < count and trials.tally.trials < 3 * count:
            trials.one()
        return trials.finish()
    finally:
        os.environ.pop("EDGEVIT_HOME")
        if before is not None:
            os.environ["EDGEVIT_HOME"] = before
