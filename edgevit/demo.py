"""The whole path on handwritten digits, as the very commands a person would type.

Everything lives in one folder of its own (``EDGEVIT_HOME`` for the commands): nothing of a person's results, keys or fleet is
touched, unless a target of theirs is named.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgevit.errors import DeviceError, EdgevitError, UsageError
from edgevit.progress import Progress
from edgevit.workers import changed_environment

if TYPE_CHECKING:
    from edgevit.results.summary import Summary

MODEL = "edgevit.digits:digits_vit"


class DemoFailed(EdgevitError):
    """A command of the demo did not end as it should; its own error was shown above."""


_FAILED: dict[int, type[EdgevitError]] = {2: UsageError, 3: DeviceError}


@dataclass(frozen=True)
class Best:
    """The fastest artifact that keeps top-1 within one point of fp32, on one target."""

    target: str
    artifact: str
    speedup: float
    file_mb: float
    points: float


def home(folder: Path) -> AbstractContextManager[None]:
    """Commands inside the block keep everything under ``folder``."""
    return changed_environment({"EDGEVIT_HOME": str(folder), "EDGEVIT_DB": None, "EDGEVIT_FLEET": None})


def call(*argv: str | Path, expect: int = 0) -> None:
    """Show and run one edgevit command. Raises what its exit code stands for, else :class:`DemoFailed`, where it is not
    ``expect``."""
    from edgevit.cli import run_cli

    words = [str(a) for a in argv]
    sys.stderr.flush()
    print(f"\n$ edgevit {shlex.join(words)}", flush=True)  # noqa: T201 -- the demo's output is a session
    code = run_cli(words)
    if code != expect:
        failed = _FAILED.get(code, DemoFailed)
        raise failed(f"edgevit {words[0]} ended with exit code {code}, expected {expect}")


def build_digits(folder: Path, progress: Progress, targets: Sequence[str]) -> list[Path]:
    """Train the digits model (kept for the next time) and build its bundles; where they are."""
    from edgevit.digits import ensure_digits

    data, weights = ensure_digits(folder, progress)
    out = folder / "bundles"
    shutil.rmtree(out, ignore_errors=True)
    chosen = [word for target in targets for word in ("--for", target)]
    recipes = ["--recipe", "fp32", "--recipe", "int8-dynamic"]
    call(
        "build", MODEL, "--weights", weights, "--labels", data.labels, *recipes, *chosen,
        "--eval", data.held_out, "--calib", data.train, "-o", out,
    )  # fmt: skip
    return [out / "fp32", out / "int8-dynamic"]


def show_refusal(bundle: Path, folder: Path) -> str:
    """Flip one bit of the model in a copy of ``bundle`` and let `edgevit verify` refuse it; which byte."""
    from edgevit.bundle import open_bundle

    copy = folder / "tampered"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    blob = open_bundle(bundle, None).manifest.artifacts[0].blob
    victim = copy / "blobs" / blob.sha256
    place = blob.size // 2
    victim.chmod(0o600)
    with victim.open("r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1]))
    print(f"\none bit of byte {place:,} of the model is flipped in a copy:", flush=True)  # noqa: T201
    call("verify", copy, expect=1)
    return f"byte {place:,}"


def add_loopback(folder: Path, stack: ExitStack) -> str | None:
    """A target behind a real sshd on this machine, if there is an sshd; its name."""
    from edgevit.loopback_sshd import LoopbackSshd, find_sshd

    if find_sshd() is None:
        print("\n(no sshd here: the demo stays on `local`; `sudo apt install openssh-server` shows SSH too)")  # noqa: T201
        return None
    server = stack.enter_context(LoopbackSshd(folder / "sshd"))
    (folder / "config" / "fleet.yaml").unlink(missing_ok=True)
    call(
        "target", "add", "loopback", f"{server.user}@{server.host}", "--port", str(server.port), "--key", server.client_key,
        "--fingerprint", server.fingerprint, "--python", sys.executable, "--root", folder / "loopback-device", "--no-provision",
    )  # fmt: skip
    # Its Python has the runtimes already (it is this one), so all that provisioning would add is the signer.
    call("key", "allow", "loopback")
    return "loopback"


def best_of(summaries: Sequence[Summary]) -> Best | None:
    """The fastest measurement that is valid in itself and keeps top-1 within one point of fp32."""
    best: Best | None = None
    for s in summaries:
        reference = next((r for r in summaries if r.scheme == "fp32" and r.target == s.target and r.top1 is not None), None)
        if reference is None or reference.top1 is None or s.top1 is None or s.speedup is None or s.file_mb is None:
            continue
        if not s.rankable:
            continue
        points = 100 * (s.top1 - reference.top1)
        if points >= -1.0 and (best is None or s.speedup > best.speedup):
            best = Best(s.target, f"{s.artifact} in {s.runtime}", s.speedup, s.file_mb, points)
    return best
