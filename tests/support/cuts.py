"""One upload over a real sshd, its connections killed again and again at random points, until it is through."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgevit import signing
from edgevit.bundle import Bundle, write_bundle
from edgevit.chunks import with_chunk_index
from edgevit.errors import LostLink
from edgevit.fleet.agent import Agent
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.progress import Quiet
from edgevit.transport.hostkeypolicy import HostKeyPolicy
from edgevit.transport.prompts import NoPrompts
from edgevit.transport.ssh import SshTransport
from edgevit.transport.sshconfig import resolve
from tests.support.bundles import make_manifest

RESENT_LIMIT = 4_000_000
RATE_MBIT = 400.0


@dataclass
class Tally:
    """What the cuts came to. ``resent``: after each, the bytes asked for beyond those that the device did not hold."""

    resent: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{len(self.resent)} cuts, re-sent after each at most {max(self.resent, default=0):,} bytes of what was held"


class Cut(Quiet):
    """Kills the server's connections once ``after`` bytes are under way, or looked at on the device; ``asked`` is what the
    device asked for in all, but for the chunk index."""

    def __init__(self, server: LoopbackSshd, after: float) -> None:
        self._server, self._after, self.asked, self.made = server, after, 0.0, False

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        if key.endswith(": upload"):
            self.asked += total or 0.0

    def advance(self, key: str, done: float, text: str = "") -> None:
        if not self.made and done > self._after:
            self.made = bool(self._server.kill_connections())


def make_big_bundle(folder: Path, key: Path, size: int, seed: int) -> Bundle:
    manifest, blobs = with_chunk_index(*make_manifest(seed=seed, model_bytes=size))
    return write_bundle(folder, manifest, blobs, lambda data: signing.sign(data, key))


def run_cuts(folder: Path, seed: int, count: int, size: int = 60_000_000) -> Tally:
    """``count`` cuts of one upload; a bundle that got through before is taken from the device and sent anew."""
    draw, tally = random.Random(seed), Tally()
    key = signing.make_key(folder / "key", "cuts")
    bundle = make_big_bundle(folder / "bundle", key, size, seed)
    root = folder / "root"
    total = sum(blob.size for blob in bundle.manifest.blobs())
    with LoopbackSshd(folder / "sshd") as server:
        known = resolve(server.host, user=server.user, port=server.port, key=str(server.client_key))
        settings, policy = replace(known, known_hosts=()), HostKeyPolicy(folder / "pins", server.fingerprint)

        def install(cut: Cut) -> bool:
            """Whether it came through."""
            agent = Agent(SshTransport.connect("cut", settings, policy, NoPrompts()), sys.executable, str(root))
            # Progress is told four times a second: an upload that is over sooner is never cut.
            agent.max_rate_mbit = min(RATE_MBIT, size * 8e-6 / 3.0)
            try:
                agent.allow([signing.allowed_signers_line("cuts", signing.public_line(key))])
                return bool(agent.install(bundle, cut).bundle)
            except LostLink as lost:
                if not cut.made:
                    tally.problems.append(f"the link was lost without a cut, {cut.asked:,.0f} bytes being asked for: {lost}")
                return False
            finally:
                agent.close()

        while len(tally.resent) < count:
            held = count_held(root, bundle)
            cut = Cut(server, draw.uniform(0, 2 * (total - held) / (count - len(tally.resent) + 1)))
            done = install(cut)
            tally.resent.append(int(cut.asked) - (total - held))
            if done:
                tally.resent.pop()
                forget(root, bundle)
            wait_until_idle(root)
        held = count_held(root, bundle)
        last = Cut(server, float("inf"))
        install(last)
        tally.resent.append(int(last.asked) - (total - held))
    tally.problems += [f"{n:,} bytes that were held were sent again" for n in tally.resent if n > RESENT_LIMIT]
    tally.problems += [
        f"blob {blob.sha256} is not what it should be"
        for blob in bundle.manifest.blobs()
        if (root / "blobs" / blob.sha256).read_bytes() != bundle.blob_path(blob.sha256).read_bytes()
    ]
    return tally


def count_held(root: Path, bundle: Bundle) -> int:
    """Bytes that lie on the device where they belong, by comparing every one with the bundle's."""
    import numpy as np

    held = 0
    for blob in bundle.manifest.blobs():
        for name in (blob.sha256, blob.sha256 + ".part"):
            with contextlib.suppress(FileNotFoundError):
                there = np.frombuffer((root / "blobs" / name).read_bytes(), np.uint8)
                whole = np.frombuffer(bundle.blob_path(blob.sha256).read_bytes(), np.uint8)
                # A byte of a hole is zero by chance as often as any: those do not count.
                right = there == whole[: len(there)]
                held += int(np.count_nonzero(right & (there != 0)) * 256 / 255) if name.endswith(".part") else blob.size
    return held


def wait_until_idle(root: Path) -> None:
    """Until the agent whose connection was cut has written its last byte, and let go of the lock of blobs."""
    deadline = time.monotonic() + 60
    fd = os.open(root / "blobs", os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("the agent that was cut off did not end") from None
                time.sleep(0.02)
    finally:
        os.close(fd)


def forget(root: Path, bundle: Bundle) -> None:
    for blob in bundle.manifest.blobs():
        (root / "blobs" / blob.sha256).unlink(missing_ok=True)
