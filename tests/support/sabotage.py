"""Agents that die before their n-th step, and devices whose disk, clock or spool is not what it should be.

A step is a call that changes the disk, or writes anywhere: a process killed before each of them in turn was killed in every
state that can be told apart afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from device_agents import wire
from device_agents.install import verify_installed
from device_agents.store import Store
from tests.support.agent_bundle import AgentProcess, AgentRefused, Signer, TinyBundle, make_bundle, make_job

STEPS = '''
"""Counts what changes the disk, and ends this process before step EDGEVIT_TEST_STEP."""
import os, signal
words = open("/proc/self/cmdline", "rb").read().split(b"\\0")
if os.environ["EDGEVIT_TEST_COMMAND"].encode() in words:
    last, done = int(os.environ["EDGEVIT_TEST_STEP"]), [0]
    def stepping(real):
        def step(*args, **kwargs):
            done[0] += 1
            if done[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return step
    for name in ("rename", "replace", "unlink", "fsync", "mkdir", "rmdir", "write", "pwrite", "ftruncate"):
        setattr(os, name, stepping(getattr(os, name)))
    import atexit
    atexit.register(lambda: open(os.environ["EDGEVIT_TEST_COUNT"], "w").write(str(done[0])))
'''

CLOCK = '''
"""A clock that is a year behind."""
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() - 365 * 86400
time.time_ns = lambda: _time_ns() - 365 * 86400 * 10**9
'''

COMMANDS = ("install", "activate", "rollback", "gc", "submit", "serve", "cancel", "ack")


@dataclass
class Tally:
    """What happened; ``problems`` must be empty."""

    killed: Counter[str] = field(default_factory=Counter)
    steps: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{self.killed.total()} kills: " + ", ".join(
            f"{what} {n} of {self.steps[what]} steps" for what, n in sorted(self.killed.items())
        )


def _version(signer: Signer, version: int) -> TinyBundle:
    """Its heaviest blob is half the same in every version, so that a device puts it together from what it holds and is sent."""
    same, own = random.Random(0).randbytes(60_000), random.Random(version).randbytes(60_000)
    return make_bundle(signer, version=version, extra_blob=same + own, chunk_index=lambda index: index)


class Device:
    """One root with version 1 of a bundle active and version 2 installed."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.agent = AgentProcess(folder / "root").upload()
        self.agent.allow(signer)
        self.old, self.new, self.third = (_version(signer, version) for version in (1, 2, 3))
        for bundle in (self.old, self.new):
            self.agent.install(bundle)
            self.activate(bundle)
        self.runs = 0
        self.job = ""

    def activate(self, bundle: TinyBundle) -> bool:
        request = {"variant": wire.encode(bundle.variant()), "policy": "test", "allow_older": True}
        return bool(self.agent.call("activate", stdin=request)["changed"])

    def prepare(self, command: str) -> None:
        """Bring the device to where ``command`` has something to do."""
        if command == "install":
            with_store = Store(self.agent.root)
            for blob in self.third.manifest.blobs():
                if blob.sha256 not in {b.sha256 for b in self.new.manifest.blobs()}:
                    with_store.remove(with_store.blob_path(blob.sha256))
            if self.third.digest in with_store.bundle_digests():
                with_store.remove_bundle(self.third.digest)
        elif command == "activate":
            self.activate(self.old)
        elif command == "gc":
            self.agent.install(self.old, allow_older=True)
        elif command in ("submit", "serve", "cancel", "ack"):
            self.runs += 1
            self.job = f"{command}-{self.runs}"
            if command != "submit":
                job = make_job(self.new, self.job)
                Store(self.agent.root).write(Store(self.agent.root).queue_path(self.job), wire.dumps(job))
            if command == "ack":
                self.agent.call("serve", "--once")

    def perform(self, command: str, agent: AgentProcess) -> None:
        """Run it; a process that dies on the way raises RuntimeError."""
        if command == "install":
            agent.install(self.third)
        elif command == "activate":
            request = {"variant": wire.encode(self.new.variant()), "policy": "test", "allow_older": True}
            agent.call("activate", stdin=request)
        elif command == "submit":
            agent.call("submit", stdin=wire.encode(make_job(self.new, self.job)))
        elif command == "serve":
            agent.call("serve", "--once")
        elif command in ("cancel", "ack"):
            agent.call(command, self.job)
        else:
            agent.call(command)

    def check(self, command: str) -> Iterator[str]:
        """What does not hold after the same command was given once more, unhindered."""
        state = self.agent.call("probe", "--quick")
        if state["active"] is None:
            yield "nothing is active"
            return
        active = wire.decode(wire.Active, state["active"], "active")
        store = Store(self.agent.root)
        for blob in verify_installed(store, active.variant.bundle).manifest.blobs():
            store.check_blob(blob)
        if command == "install" and self.third.digest not in store.bundle_digests():
            yield "the bundle is not installed"
        if command == "activate" and active.variant.bundle != self.new.digest:
            yield "the new bundle is not active"
        if command in ("submit", "serve", "cancel"):
            try:
                run = self.agent.follow(self.job)
            except AgentRefused as e:
                yield f"run {self.job} is lost: {e}"
                return
            wanted = {"cancel": ("interrupted", "completed")}.get(command, ("completed",))
            if run.status not in wanted:
                yield f"run {self.job} is {run.status}: {run.reason}"
            self.agent.call("ack", self.job)
        if self.job and self.agent.call("waiting")["runs"]:
            yield f"something still waits: {self.agent.call('waiting')}"
        left = [p.name for p in (self.agent.root / "queue").iterdir() if not p.name.startswith(".tmp-")]
        if left:
            yield f"left in the queue: {left}"


def kill_steps(folder: Path, signer: Signer, seed: int, share: float) -> Tally:
    """Kill each command of the agent before each of its steps; of the steps a seeded ``share``, all with 1.0."""
    tally, draw = Tally(), random.Random(seed)
    hooks = folder / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "sitecustomize.py").write_text(STEPS)
    device = Device(folder / "device", signer)
    for command in COMMANDS:
        counted = folder / "count"
        device.prepare(command)
        device.perform(command, hindered(device.agent, hooks, command, 0, counted))
        total = int(counted.read_text())
        tally.steps[command] = total
        tally.problems += [f"{command}, not hindered: {text}" for text in device.check(command)]
        for step in range(1, total + 1):
            if draw.random() >= share:
                continue
            device.prepare(command)
            try:
                device.perform(command, hindered(device.agent, hooks, command, step, counted))
            except (RuntimeError, OSError) as e:
                if command != "install" and f"exit {-signal.SIGKILL}" not in str(e):  # an install's pipes just end
                    tally.problems.append(f"{command} before step {step}: {str(e)[:500]}")
            tally.killed[command] += 1
            try:
                repeat(lambda command=command: device.perform(command, device.agent), command)  # type: ignore[misc]
                tally.problems += [f"{command} before step {step}: {text}" for text in device.check(command)]
            except (RuntimeError, AgentRefused) as e:
                tally.problems.append(f"{command} before step {step}, given once more: {str(e)[:1500]}")
    return tally


def repeat(perform: Callable[[], None], command: str) -> None:
    """The same command once more. A rollback that was done before the kill is undone by a second: both states are whole."""
    try:
        perform()
    except AgentRefused as e:
        # The first one was done and only its answer lost.
        if not (command in ("ack", "cancel") and e.code == "no-such-run"):
            raise


def hindered(agent: AgentProcess, hooks: Path, command: str, step: int, counted: Path) -> AgentProcess:
    """The same agent, dying before ``step`` of ``command``; 0: never, only counting."""
    env = {
        "PYTHONPATH": str(hooks),
        "EDGEVIT_TEST_COMMAND": command,
        "EDGEVIT_TEST_STEP": str(step),
        "EDGEVIT_TEST_COUNT": str(counted),
    }
    return dataclasses.replace(agent, env=env)


def with_wrong_clock(agent: AgentProcess, folder: Path) -> AgentProcess:
    """The same agent on a device whose clock is a year behind."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(CLOCK)
    return dataclasses.replace(agent, env={**os.environ, "PYTHONPATH": str(folder)})
