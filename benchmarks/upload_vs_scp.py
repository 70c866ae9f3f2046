"""Upload speed: a 25 MB bundle, from connecting to verified on the device, against ``scp`` of a file of that size.

Both go to one throw-away sshd on loopback, interleaved in random order; both start with no connection. edgevit's share is
connect → host key check → login → agent start → signature verified → upload → every blob's SHA-256 → fsync → installed; scp's
is connect → login → copy. scp neither hashes nor syncs. Each upload goes to an empty root that knows the agent and the signer.
With ``--rtt`` or ``--loss`` the server stands behind a link of that kind (:mod:`lossy_link`; root only).

    python benchmarks/upload_vs_scp.py [--rounds 9] [--megabytes 25] [--rtt MS] [--loss PERCENT] [--goal 1.2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lossy_link import LossyLink

from edgevit.loopback_sshd import LoopbackSshd

GOAL = 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS", help="round trip of the link")
    parser.add_argument("--loss", type=float, default=0.0, metavar="PERCENT", help="packets lost, in each direction")
    parser.add_argument("--goal", type=float, default=GOAL)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgevit-upload-") as folder:
        os.environ["EDGEVIT_HOME"] = str(Path(folder) / "home")
        link = LossyLink(given.rtt, given.loss / 100, given.seed) if given.rtt or given.loss else None
        result = measure(Path(folder), given.rounds, int(given.megabytes * 1e6), given.seed, link)
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    ratio = f"ratio {result['ratio']:.2f} (goal ≤ {given.goal})"
    print(f"edgevit {result['edgevit_ms']:.0f} ms, scp {result['scp_ms']:.0f} ms: {ratio}")
    return 0 if result["ratio"] <= given.goal else 1


def measure(folder: Path, rounds: int, size: int, seed: int, link: LossyLink | None) -> dict[str, object]:
    with ExitStack() as stack:
        where = {"host": stack.enter_context(link).address, "through": link.through} if link else {}
        server = stack.enter_context(LoopbackSshd(folder / "sshd", **where))
        upload, forget = prepare_upload(folder, server, size, seed)
        times: dict[str, list[float]] = {"edgevit": [], "scp": []}
        known = folder / "known_hosts"
        known.write_text(server.known_hosts_line + "\n")
        source = folder / "payload"
        source.write_bytes(random.Random(seed).randbytes(size))

        def scp() -> None:
            target = folder / "copied"
            argv = ["scp", "-q", "-F", "/dev/null", "-o", f"UserKnownHostsFile={known}", "-o", "IdentitiesOnly=yes", "-i"]
            argv += [str(server.client_key), "-P", str(server.port), str(source), f"{server.user}@{server.host}:{target}"]
            subprocess.run(argv, check=True)
            if target.stat().st_size != size:
                raise SystemExit("scp copied another size")
            target.unlink()

        order = random.Random(seed)
        for round_ in range(rounds + 1):
            runs = [("edgevit", upload), ("scp", scp)]
            order.shuffle(runs)
            for name, run in runs:
                started = time.perf_counter()
                run()
                taken = time.perf_counter() - started
                forget()
                if round_:  # the first round warms caches on both sides
                    times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": size,
        "rounds": rounds,
        "edgevit_ms": medians["edgevit"] * 1e3,
        "scp_ms": medians["scp"] * 1e3,
        "ratio": medians["edgevit"] / medians["scp"],
        "samples_ms": {name: [round(v * 1e3, 1) for v in values] for name, values in times.items()},
    }


def prepare_upload(folder: Path, server: LoopbackSshd, size: int, seed: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """What is timed (one deployment to a root without blobs) and what makes the root so again."""
    from edgevit import signing
    from edgevit.bundle import Bundle, open_bundle
    from edgevit.fleet.agent import Agent
    from edgevit.transport.hostkeypolicy import HostKeyPolicy
    from edgevit.transport.prompts import NoPrompts
    from edgevit.transport.ssh import SshTransport
    from edgevit.transport.sshconfig import resolve

    key = signing.make_key(folder / "signing_key", "throw-away")
    line = signing.allowed_signers_line("bench@loopback", signing.public_line(key))
    (folder / "signers").write_text(line + "\n")
    write_random_bundle(folder / "bundle", key, size, seed)
    bundle: Bundle = open_bundle(folder / "bundle", folder / "signers")
    settings = replace(resolve(server.host, user=server.user, port=server.port, key=str(server.client_key)), known_hosts=())
    policy = HostKeyPolicy(folder / "pins", server.fingerprint)
    root = folder / "root"

    def agent() -> Agent:
        transport = SshTransport.connect("loopback", settings, policy, NoPrompts())
        return Agent(transport, sys.executable, str(root))

    first = agent()
    first.allow([line])
    first.close()

    def upload() -> None:
        one = agent()
        done = one.install(bundle)
        one.close()
        if not done.newly or done.received_bytes < size:
            raise SystemExit(f"the device took only {done.received_bytes} bytes")

    def forget() -> None:
        for name in ("blobs", "bundles"):
            shutil.rmtree(root / name, ignore_errors=True)

    return upload, forget


def write_random_bundle(folder: Path, key: Path, size: int, seed: int) -> None:
    """A signed bundle whose one artifact is ``size`` random bytes: shipping does not look into models."""
    import hashlib

    from device_agents import wire
    from edgevit import signing
    from edgevit.bundle import write_bundle
    from edgevit.chunks import with_chunk_index

    rng = random.Random(seed)
    blobs: dict[str, Path | bytes] = {}

    def blob(count: int) -> wire.Blob:
        data = rng.randbytes(count)
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return wire.Blob(digest, count)

    golden = wire.GoldenOutputs(blob(4096), "onnxruntime", "0", wire.Tolerance(1e-3, 0.99, 0.0))
    artifact = wire.Artifact(
        name="random-onnx",
        format="onnx",
        scheme="fp32",
        blob=blob(size),
        input=wire.TensorSpec("x", "float32", (1, 3, 8, 8), "NCHW"),
        output=wire.TensorSpec("y", "float32", (1, 10)),
        batch=1,
        opset=18,
        ir_version=10,
        operators={},
        fits=("generic-x86-64",),
        golden=golden,
        parity=wire.Parity(1, 0.0, 0.0, 1.0, 1.0),
        checked=(),
    )
    manifest = wire.Manifest(
        schema=wire.BUNDLE_SCHEMA,
        name="random",
        version=1,
        minimum_agent=1,
        made_by="upload_vs_scp",
        model=wire.ModelInfo("random", "0" * 64, "random", 10, 0, None, {}),
        recipe=wire.RecipeInfo("fp32", "0" * 64),
        steps=(),
        preprocessing=wire.Preprocessing(8, 8, 8, "bilinear", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        labels=None,
        golden=wire.GoldenInputs(blob(4096), 1, "synthetic"),
        evaluation=None,
        evaluation_absent="random bytes",
        artifacts=(artifact,),
        tools={},
    )
    manifest, blobs = with_chunk_index(manifest, blobs)
    write_bundle(folder, manifest, blobs, lambda data: signing.sign(data, key))


if __name__ == "__main__":
    sys.exit(main())
