"""The only maker of a :class:`VerifiedManifest`. No input or output happens here: bytes and a signature checker go in.

Steps, in this order; each failure is a :class:`~device_agents.errors.Refused` with the code in brackets:

1. the manifest has 1 to :data:`~device_agents.wire.MAX_MANIFEST_BYTES` bytes [bad-manifest] and the signature at most
   :data:`~device_agents.wire.MAX_SIGNATURE_BYTES` [bad-signature], before either is looked into;
2. the checker accepts the signature over exactly these bytes and names its signer [bad-signature, unknown-signer,
   no-signers, no-ssh-keygen]; only now is anything parsed;
3. the bytes are one JSON object within limits of depth and without duplicate keys [bad-manifest];
4. its schema is the one known here [newer-schema, bad-manifest] and its minimum agent is not newer than this one
   [agent-too-old]; this comes before the strict decoding so that a newer document is told from a broken one;
5. it decodes strictly as a :class:`~device_agents.wire.Manifest` [bad-manifest]. Names cannot hold a path separator and
   blobs have no names at all, so nothing in a manifest can point outside the store;
6. where a bundle of the same name is active, the version is not below it unless that was asked for [older-version]:
   :func:`check_version`.

The host runs the same steps on the bundle it ships.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Callable, Optional

from device_agents import wire
from device_agents.errors import Refused

Checker = Callable[[bytes, bytes], str]
"""(manifest bytes, signature bytes) → the signer's name; raises :class:`Refused`."""

_SCHEMA_FAMILY, _, _SCHEMA_NUMBER = wire.BUNDLE_SCHEMA.partition("/")
_MADE_HERE = object()


@dataclass(frozen=True)
class VerifiedManifest:
    """A manifest whose signature held. ``digest`` is the SHA-256 of its bytes and the bundle's identity."""

    manifest: wire.Manifest
    manifest_bytes: bytes
    signature: bytes
    digest: str
    signer: str
    proof: object = None

    def __post_init__(self) -> None:
        if self.proof is not _MADE_HERE:
            raise TypeError("a VerifiedManifest is made by verify_manifest alone")


def verify_manifest(manifest_bytes: bytes, signature: bytes, checker: Checker) -> VerifiedManifest:
    """Run steps 1 to 5. Raises :class:`Refused`."""
    if not 0 < len(manifest_bytes) <= wire.MAX_MANIFEST_BYTES:
        raise Refused(
            "bad-manifest",
            "the manifest has {:,} bytes, expected 1 to {:,}".format(len(manifest_bytes), wire.MAX_MANIFEST_BYTES),
        )
    if not 0 < len(signature) <= wire.MAX_SIGNATURE_BYTES:
        raise Refused(
            "bad-signature", "the signature has {:,} bytes, expected 1 to {:,}".format(len(signature), wire.MAX_SIGNATURE_BYTES)
        )
    signer = checker(manifest_bytes, signature)
    manifest = parse_manifest(manifest_bytes)
    return VerifiedManifest(
        manifest=manifest,
        manifest_bytes=manifest_bytes,
        signature=signature,
        digest=hashlib.sha256(manifest_bytes).hexdigest(),
        signer=signer,
        proof=_MADE_HERE,
    )


def parse_manifest(manifest_bytes: bytes) -> wire.Manifest:
    """Steps 3 to 5: bytes → Manifest, telling a newer one from a broken one. Says nothing about who wrote it."""
    try:
        document = wire.parse_json(manifest_bytes, "manifest", wire.MAX_MANIFEST_BYTES)
        if isinstance(document, dict):
            _check_age(document.get("schema"), document.get("minimum_agent"))
        return wire.decode(wire.Manifest, document, "manifest")
    except wire.WireError as e:
        raise Refused("bad-manifest", str(e), "build the bundle again") from e


def _check_age(schema: object, minimum_agent: object) -> None:
    if isinstance(schema, str) and schema != wire.BUNDLE_SCHEMA:
        found = re.fullmatch(re.escape(_SCHEMA_FAMILY) + r"/([1-9][0-9]{0,8})", schema)
        if found and int(found.group(1)) > int(_SCHEMA_NUMBER):
            raise Refused(
                "newer-schema",
                "the manifest has schema {}, this agent reads {}".format(schema, wire.BUNDLE_SCHEMA),
                "use the edgevit that made the bundle",
            )
    if isinstance(minimum_agent, int) and not isinstance(minimum_agent, bool) and minimum_agent > wire.AGENT_VERSION:
        raise Refused(
            "agent-too-old",
            "the manifest needs agent {}, this is agent {}".format(minimum_agent, wire.AGENT_VERSION),
            "use the edgevit that made the bundle",
        )


def check_version(manifest: wire.Manifest, active: Optional[wire.Active], allow_older: bool) -> None:
    """Step 6. Raises ``older-version`` unless ``allow_older``."""
    if active is None or allow_older or active.bundle_name != manifest.name:
        return
    if manifest.version < active.bundle_version:
        raise Refused(
            "older-version",
            "bundle {!r} has version {}, version {} is active".format(manifest.name, manifest.version, active.bundle_version),
            "roll back instead, or allow an older version expressly",
        )
