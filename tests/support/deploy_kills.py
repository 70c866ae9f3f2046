"""`kill -9` of the operator's command at seeded random moments of a deployment to several devices; the same command again must
bring them all to the new version, with nothing doubled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from edgevit.fleet.connect import connect
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import TinyBundle, make_bundle
from tests.support.small_fleet import SmallFleet, small_fleet
from tests.support.sshd import test_account

LIMIT_S = 300.0


@dataclass
class DeployTally:
    """What happened; ``problems`` must be empty. ``states``: what a kill left behind, by device."""

    trials: int = 0
    killed: int = 0
    states: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        left = ", ".join(f"{n} × {what}" for what, n in sorted(self.states.items()))
        return f"{self.trials} deployments, {self.killed} killed; devices were left: {left or 'none'}"


class DeployTrials:
    """Versions go up from trial to trial, so each deployment has something to send, install and activate everywhere. Where
    ``thorough``, what each kill left behind is looked at too, and old versions are removed."""

    def __init__(self, fleet: SmallFleet, folder: Path, seed: int, *, thorough: bool = True) -> None:
        self.fleet, self.folder, self.thorough = fleet, folder, thorough
        self.random = random.Random(seed)
        self.tally = DeployTally()
        self.version = 1000

    def _next(self) -> tuple[TinyBundle, Path]:
        self.version += 1
        made = make_bundle(
            self.fleet.signer,
            version=self.version,
            extra_blob=f'["{self.version}"]'.encode() + self.random.randbytes(2_000_000),
        )
        return made, made.write(self.folder / str(self.version))

    def _start(self, path: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "edgevit", "deploy", str(path), *self.fleet.names],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def _deploy_whole(self, path: Path) -> None:
        process = self._start(path)
        _, said = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            self._problem(f"it ended with {process.returncode}: {said.decode()[-1000:]}")

    def one(self) -> None:
        """Kill a random while after a random line of what it says, look, run it again, look."""
        made, path = self._next()
        process = self._start(path)
        lines = 1 + 3 * len(self.fleet.targets)  # of all together, then for each device: connecting, facts and plan, sending
        assert process.stderr is not None
        for _ in range(self.random.randint(1, lines)):
            process.stderr.readline()
        time.sleep(self.random.uniform(0.0, 0.5))
        self.tally.killed += process.poll() is None
        process.kill()
        process.communicate(timeout=LIMIT_S)
        self.tally.trials += 1
        for target in self.fleet.targets if self.thorough else ():
            with connect(target, NoPrompts()) as agent:
                facts = agent.probe(quick=True)
                installed = any(b.bundle == made.digest for b in facts.bundles)
                on = facts.active is not None and facts.active.variant.bundle == made.digest
                self.tally.states["active" if on else "installed" if installed else "as before"] += 1
                if facts.active is None and self.tally.trials > 1:
                    self._problem(f"nothing is active on {target.name} any more")
        self._deploy_whole(path)
        for target in self.fleet.targets:
            self._check(target.name, made)

    def _check(self, name: str, made: TinyBundle) -> None:
        target = next(t for t in self.fleet.targets if t.name == name)
        with connect(target, NoPrompts()) as agent:
            facts = agent.probe(quick=True)
            if facts.active is None or facts.active.variant.bundle != made.digest:
                self._problem(f"{name} did not come to version {made.manifest.version}")
            before = facts.previous.bundle_version if facts.previous else None
            if self.tally.trials > 1 and before != self.version - 1:
                self._problem(f"{name} would go back to {before}, not {self.version - 1}: it was activated twice")
            if [b.bundle for b in facts.bundles].count(made.digest) != 1:
                self._problem(f"{name} holds the bundle not exactly once")
            if self.thorough:
                agent.gc()
        root = Path(target.root)
        left = [p.name for p in (root / "blobs").iterdir() if p.name.endswith(".part")]
        left += [p.name for p in root.iterdir() if p.name.startswith(".tmp-")]
        if left or (root / "operator.json").exists():
            self._problem(f"{name} is left with {left or 'a lock'}")

    def _problem(self, text: str) -> None:
        self.tally.problems.append(f"trial {self.tally.trials}: {text}")


def deploy_trials(folder: Path, seed: int, count: int) -> DeployTally:
    """Trials with three devices over real sshds until ``count`` commands were killed. Meanwhile EDGEVIT_HOME is in it."""
    before = os.environ.get("EDGEVIT_HOME")
    os.environ["EDGEVIT_HOME"] = str(folder / "home")
    try:
        with test_account() as account, small_fleet(account, 3) as fleet:
            trials = DeployTrials(fleet, folder, seed)
            while trials.tally.killed < count and trials.tally.trials < 3 * count:
                trials.one()
            return trials.tally
    finally:
        os.environ.pop("EDGEVIT_HOME")
        if before is not None:
            os.environ["EDGEVIT_HOME"] = before
