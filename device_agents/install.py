"""``have`` and ``install``: bundles arrive on standard input, are hashed meanwhile, and appear at once or not at all."""

from __future__ import annotations

import base64
import binascii
import contextlib
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from device_agents import wire
from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.sshsig import SshKeygenChecker
from device_agents.store import Store
from device_agents.verify import VerifiedManifest, check_version, verify_manifest

if TYPE_CHECKING:
    from device_agents.assembly import Index

_REQUEST_BYTES = (wire.MAX_MANIFEST_BYTES + wire.MAX_SIGNATURE_BYTES) * 4 // 3 + 4096
_HAVE_BYTES = wire.MAX_MANIFEST_BYTES + wire.MAX_INDEX_BYTES * 4 // 3 + 4096


def have(store: Store, console: Console) -> Dict[str, Any]:
    """Which of the blobs asked for are missing, how much of each need not be sent, how much of that would be copied here from
    other blobs (where ``chunks``, a chunk index in base64, says how they are cut), and the free space; all in bytes."""
    from device_agents.assembly import Assembly

    blobs, index = _parse_have(console.read_line(_HAVE_BYTES, "have"))
    there = store.inventory()
    missing = [b for b in blobs if there.get(b.sha256) != b.size]
    partial, copied = {}, 0
    with console.heartbeat(), contextlib.closing(Assembly(store, index, missing)) as assembly:
        for blob in missing:
            held, from_others = assembly.survey(blob)
            copied += from_others
            if held:
                partial[blob.sha256] = held
    return {
        "missing": [b.sha256 for b in missing],
        "partial": partial,
        "copied_bytes": copied,
        "free_bytes": store.free_bytes(),
    }


def _parse_have(line: bytes) -> "Tuple[List[wire.Blob], Index]":
    try:
        request = wire.parse_json(line, "have", _HAVE_BYTES)
        if not isinstance(request, dict) or not {"blobs"} <= set(request) <= {"blobs", "chunks"}:
            raise Refused("bad-request", 'have: expected {"blobs": [{"sha256": …, "size": …}, …], "chunks": …}')
        if not isinstance(request["blobs"], list):
            raise Refused("bad-request", "have: blobs is not a list")
        blobs = [wire.decode(wire.Blob, b, "have.blobs") for b in request["blobs"]]
        if "chunks" not in request:
            return blobs, {}
        data = base64.b64decode(str(request["chunks"]), validate=True)
        return blobs, wire.check_index(data, {b.sha256: b.size for b in blobs})
    except (wire.WireError, binascii.Error, ValueError) as e:
        raise Refused("bad-request", "have: {}".format(e)) from e


def verify_bundle(store: Store, manifest: bytes, signature: bytes) -> VerifiedManifest:
    """Steps 1 to 5 of :mod:`device_agents.verify` with this root's signers."""
    store.create()
    if store.read(store.signers_path, wire.MAX_JOB_BYTES) is None:
        raise Refused("no-signers", "nobody may sign bundles for this device yet", "edgevit key allow")
    with store.scratch() as scratch:
        return verify_manifest(manifest, signature, SshKeygenChecker(store.signers_path, scratch))


def verify_installed(store: Store, digest: str) -> VerifiedManifest:
    """An installed bundle's manifest, its signature verified anew. Raises ``not-installed`` and all that verifying raises."""
    manifest, signature = store.bundle_bytes(digest)
    verified = verify_bundle(store, manifest, signature)
    if verified.digest != digest:
        raise Refused(
            "blob-damaged", "bundle {} holds another manifest: {}".format(digest, verified.digest), "deploy the bundle again"
        )
    return verified


def install(store: Store, console: Console) -> Dict[str, Any]:
    """Verify a manifest, take in the blobs it lacks, and make the bundle visible. See the contract of the wire."""
    from device_agents.activate import read_active
    from device_agents.intake import IDLE_S, locked_blobs, take_in

    manifest_bytes, signature, allow_older = _parse_request(console.read_line(_REQUEST_BYTES, "install", IDLE_S))
    verified = verify_bundle(store, manifest_bytes, signature)
    state = read_active(store, allow_older)
    check_version(verified.manifest, state.active if state else None, allow_older)
    with locked_blobs(store, console):
        store.clean_temporaries()
        received, complete = take_in(store, console, verified.manifest.blobs(), "the bundle", chunks=verified.manifest.chunks)
        fresh = not _is_installed(store, verified)
        if fresh:
            with console.heartbeat():
                store.commit_bundle(verified.digest, manifest_bytes, signature)
    return {"bundle": verified.digest, "installed": fresh or not complete, "received_bytes": received}


def _parse_request(line: bytes) -> Tuple[bytes, bytes, bool]:
    try:
        request = wire.parse_json(line, "install", _REQUEST_BYTES)
        if not isinstance(request, dict) or not set(request) <= {"manifest", "signature", "allow_older"}:
            raise Refused("bad-request", "install: expected the keys manifest, signature, allow_older")
        allow_older = request.get("allow_older", False)
        if not isinstance(allow_older, bool):
            raise Refused("bad-request", "install: allow_older is neither true nor false")
        manifest, signature = (base64.b64decode(str(request.get(k, "")), validate=True) for k in ("manifest", "signature"))
    except (wire.WireError, binascii.Error, ValueError) as e:
        raise Refused("bad-request", "install: {}".format(e)) from e
    return manifest, signature, allow_older


def _is_installed(store: Store, verified: VerifiedManifest) -> bool:
    try:
        return store.bundle_bytes(verified.digest) == (verified.manifest_bytes, verified.signature)
    except Refused:
        return False


def find_installed(store: Store) -> Tuple[List[wire.InstalledBundle], Dict[str, str]]:
    """Installed bundles as their manifests say, unverified, for listing alone; and why some could not be read."""
    from device_agents.verify import parse_manifest

    found, absent = [], {}
    for digest in store.bundle_digests():
        try:
            manifest = parse_manifest(store.bundle_bytes(digest)[0])
            found.append(wire.InstalledBundle(digest, manifest.name, manifest.version))
        except Refused as e:
            absent["bundles/" + digest[:12]] = str(e)[:400]
    return found, absent


def artifact_of(manifest: wire.Manifest, variant: wire.Variant) -> wire.Artifact:
    """The artifact a variant names. Raises ``no-such-artifact``, ``does-not-fit`` or ``scheme-refused``."""
    artifact: Optional[wire.Artifact] = manifest.artifact(variant.artifact)
    if artifact is None:
        raise Refused(
            "no-such-artifact",
            "bundle {!r} has no artifact {!r}; it has {}".format(
                manifest.name, variant.artifact, ", ".join(a.name for a in manifest.artifacts)
            ),
        )
    if variant.runtime not in wire.RUNTIMES_OF_FORMAT[artifact.format]:
        raise Refused(
            "does-not-fit",
            "artifact {!r} is {}, which {} does not run; {} does".format(
                artifact.name, artifact.format, variant.runtime, " or ".join(wire.RUNTIMES_OF_FORMAT[artifact.format])
            ),
        )
    from device_agents.runtimes import check_scheme

    check_scheme(variant.runtime, artifact.scheme)
    return artifact
