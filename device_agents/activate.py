"""What is active on this device, and who may sign for it: ``activate rollback allow signers``."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, Optional, Set

from device_agents import wire
from device_agents.clock import utc_now
from device_agents.codec import text
from device_agents.console import Console
from device_agents.entry import write_entry
from device_agents.errors import Refused
from device_agents.install import artifact_of, verify_installed
from device_agents.intake import locked_blobs
from device_agents.servers import agent_argv
from device_agents.sshsig import fingerprint_of_signer, parse_signer_line
from device_agents.store import Store
from device_agents.supervise import run_worker, runtime_python
from device_agents.verify import check_version

MAX_SIGNERS = 10_000
SIGNERS_WAIT_S = 10.0
GOLDEN_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ActiveState:
    """The whole of ``active.json``: replaced in one rename, so ``active`` and ``previous`` always belong together."""

    active: wire.Active
    previous: Optional[wire.Active]


def read_active(store: Store, allow_damaged: bool = False) -> Optional[ActiveState]:
    """What is active; None where nothing ever was. Raises ``io-error`` on a damaged file.

    ``allow_damaged``: None there as well. Which version was active is lost then, so this is for whoever allows older ones.
    """
    data = store.read(store.active_path, wire.MAX_JOB_BYTES)
    if data is None:
        return None
    try:
        return wire.loads(ActiveState, data, "active.json", wire.MAX_JOB_BYTES)
    except wire.WireError as e:
        if allow_damaged:
            return None
        raise Refused(
            "io-error",
            "{} is damaged: {}; a deployment with --allow-older writes it anew".format(store.active_path, e),
            "edgevit deploy BUNDLE --allow-older",
        ) from e


@dataclass(frozen=True)
class _ActivateRequest:
    variant: wire.Variant
    policy: str = text(max_len=400, default="")
    allow_older: bool = False


def activate(store: Store, console: Console, agent_sha256: str) -> Dict[str, Any]:
    """Make one variant of an installed bundle the active one, after verifying the bundle whole once more and seeing the variant
    give its golden outputs in a process of its own. Raises ``golden-mismatch`` and leaves what was active active."""
    try:
        request = wire.decode(_ActivateRequest, console.read_json("activate"), "activate")
    except wire.WireError as e:
        raise Refused("bad-request", str(e)) from e
    with locked_blobs(store, console), console.heartbeat():
        verified = verify_installed(store, request.variant.bundle)
        artifact = artifact_of(verified.manifest, request.variant)
        for blob in verified.manifest.blobs():
            store.check_blob(blob)
        state = read_active(store, request.allow_older)
        if state is not None and state.active.variant == request.variant:
            write_entry(store, agent_sha256)
            return {"active": wire.encode(state.active), "changed": False}
        check_version(verified.manifest, state.active if state else None, request.allow_older)
        _check_golden(store, agent_sha256, verified.manifest, artifact, request.variant)
        write_entry(store, agent_sha256)
        active = wire.Active(request.variant, verified.manifest.name, verified.manifest.version, request.policy, utc_now())
        store.write(store.active_path, wire.dumps(ActiveState(active, state.active if state else None)))
    return {"active": wire.encode(active), "changed": True}


def _check_golden(
    store: Store, agent_sha256: str, manifest: wire.Manifest, artifact: wire.Artifact, variant: wire.Variant
) -> None:
    request = {
        "kind": "golden",
        "root": str(store.root),
        "variant": wire.encode(variant),
        "artifact": wire.encode(artifact),
        "preprocessing": wire.encode(manifest.preprocessing),
        "golden": wire.encode(manifest.golden),
    }
    argv = agent_argv(runtime_python(store), agent_sha256, store, "worker")
    run_worker(argv, request, GOLDEN_TIMEOUT_S, lambda message: None)


def rollback(store: Store, console: Console, agent_sha256: str, undo: str = "") -> Dict[str, Any]:
    """Make the previous variant active again; the one left becomes the previous. It gave its golden outputs when it was
    activated, and a way back must not depend on a runtime that may be what broke. Raises ``no-active``, ``no-previous``.

    ``undo``: only what was activated at this very time is left; where something else is active nothing is changed. So a host
    that lost the answer may ask again."""
    with locked_blobs(store, console), console.heartbeat():
        state = read_active(store)
        if state is None:
            raise Refused("no-active", "nothing is active on this device", "deploy a bundle")
        if undo and state.active.activated_at != undo:
            return {"active": wire.encode(state.active)}
        if state.previous is None:
            raise Refused("no-previous", "nothing was active before bundle {!r}".format(state.active.bundle_name))
        verified = verify_installed(store, state.previous.variant.bundle)
        for blob in verified.manifest.blobs():
            store.check_blob(blob)
        write_entry(store, agent_sha256)
        back = replace(state.previous, activated_at=utc_now())
        store.write(store.active_path, wire.dumps(ActiveState(back, state.active)))
    return {"active": wire.encode(back)}


def allow(store: Store, console: Console) -> Dict[str, Any]:
    """Add lines to ``allowed_signers``, or replace it, and take keys out of it by fingerprint. Nothing is written when one line
    is wrong. What is active stays active: only what is installed or activated from now on is refused."""
    request = console.read_json("allow")
    keys = {"lines", "replace", "revoke"}
    if not isinstance(request, dict) or not set(request) <= keys or not isinstance(request.get("lines"), list):
        raise Refused("bad-request", 'allow: expected {"lines": […], "replace": true or false, "revoke": […]}')
    if not isinstance(request.get("replace", False), bool) or not isinstance(request.get("revoke", []), list):
        raise Refused("bad-request", "allow: replace is neither true nor false, or revoke is no list")
    new = [parse_signer_line(str(line)) for line in request["lines"]]
    revoked = {str(fingerprint) for fingerprint in request.get("revoke", [])}
    store.create()
    with _alone_at_signers(store):
        before = read_signers(store)
        kept = [] if request.get("replace", False) else before
        added = [line for line in dict.fromkeys(new) if line not in kept]
        lines = [line for line in kept + added if not _is_of(line, revoked)]
        if len(lines) > MAX_SIGNERS:
            raise Refused("bad-request", "allow: {:,} signers, at most {:,}".format(len(lines), MAX_SIGNERS))
        if lines != before:
            store.write(store.signers_path, "".join(line + "\n" for line in lines).encode("utf-8"))
    return {"signers": len(lines), "added": len(added), "removed": sum(line not in lines for line in before)}


@contextlib.contextmanager
def _alone_at_signers(store: Store) -> Iterator[None]:
    """Of two who change the file at once, the second must not bring back what the first revoked. The root itself is locked: a
    file for it could not be made on a full disk."""
    deadline = time.monotonic() + SIGNERS_WAIT_S
    while True:
        lock = store.try_lock(store.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if lock is not None:
            break
        if time.monotonic() >= deadline:
            raise Refused("busy", "somebody else has been changing who may sign for over {:.0f} s".format(SIGNERS_WAIT_S))
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(lock)


def _is_of(line: str, fingerprints: "Set[str]") -> bool:
    if not fingerprints:
        return False
    with contextlib.suppress(Refused):  # a line that a person wrote wrongly allows nobody
        return fingerprint_of_signer(line) in fingerprints
    return False


def read_signers(store: Store) -> "list[str]":
    data = store.read(store.signers_path, wire.MAX_JOB_BYTES) or b""
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
