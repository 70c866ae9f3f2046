"""The numbered steps of device_agents.verify, each attack named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from device_agents.errors import Refused
from device_agents.sshsig import SshKeygenChecker
from device_agents.verify import VerifiedManifest, check_version, parse_manifest, verify_manifest
from tests.support.agent_bundle import Signer, TinyBundle


@pytest.fixture
def checker(signer: Signer, tmp_path: Path) -> SshKeygenChecker:
    (tmp_path / "allowed").write_text(signer.line() + "\n")
    return SshKeygenChecker(tmp_path / "allowed", tmp_path)


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.code


def test_a_good_bundle_verifies(bundle: TinyBundle, checker: SshKeygenChecker) -> None:
    verified = verify_manifest(bundle.manifest_bytes, bundle.signature, checker)
    assert (verified.manifest, verified.digest, verified.signer) == (bundle.manifest, bundle.digest, "tester")


def test_a_verified_manifest_is_made_nowhere_else(bundle: TinyBundle) -> None:
    with pytest.raises(TypeError):
        VerifiedManifest(bundle.manifest, bundle.manifest_bytes, bundle.signature, bundle.digest, "me")


def test_bit_flips_in_the_manifest(bundle: TinyBundle, checker: SshKeygenChecker) -> None:
    for at in range(0, len(bundle.manifest_bytes), len(bundle.manifest_bytes) // 20):
        flipped = bytearray(bundle.manifest_bytes)
        flipped[at] ^= 1
        assert code_of(lambda f=bytes(flipped): verify_manifest(f, bundle.signature, checker)) == "bad-signature"


def test_sizes_are_checked_before_anything_is_looked_into() -> None:
    def never(manifest: bytes, signature: bytes) -> str:
        pytest.fail("the checker was asked")

    big = b" " * (wire.MAX_MANIFEST_BYTES + 1)
    assert code_of(lambda: verify_manifest(big, b"s", never)) == "bad-manifest"
    assert code_of(lambda: verify_manifest(b"", b"s", never)) == "bad-manifest"
    assert code_of(lambda: verify_manifest(b"{}", b"s" * (wire.MAX_SIGNATURE_BYTES + 1), never)) == "bad-signature"


def test_nothing_is_parsed_before_the_signature_holds() -> None:
    def refuse(manifest: bytes, signature: bytes) -> str:
        raise Refused("unknown-signer", "stranger")

    assert code_of(lambda: verify_manifest(b"[" * 100_000, b"s", refuse)) == "unknown-signer"


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        for key in keys:
            document = document[key]
        document[last] = value

    return change


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer schema": (set_at("schema", "edgevit.bundle/2"), "newer-schema"),
    "foreign schema": (set_at("schema", "edgevit.facts/1"), "bad-manifest"),
    "schema is no text": (set_at("schema", 7), "bad-manifest"),
    "agent too old": (set_at("minimum_agent", wire.AGENT_VERSION + 1), "agent-too-old"),
    "dots in an artifact's name": (set_at("artifacts.0.name", "../../etc/passwd"), "bad-manifest"),
    "absolute path as a name": (set_at("artifacts.0.name", "/etc/passwd"), "bad-manifest"),
    "dots in a digest": (set_at("artifacts.0.blob.sha256", "../" * 21 + "a"), "bad-manifest"),
    "negative size": (set_at("artifacts.0.blob.size", -1), "bad-manifest"),
    "enormous size": (set_at("artifacts.0.blob.size", 2**60), "bad-manifest"),
    "two sizes of one blob": (set_at("golden.blob", None), "bad-manifest"),
    "unknown key": (set_at("surprise", 1), "bad-manifest"),
    "no artifacts": (set_at("artifacts", []), "bad-manifest"),
    "zero standard deviation": (set_at("preprocessing.std", [0.1, 0.0, 0.1]), "bad-manifest"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_signed_manifest_that_is_wrong_is_refused(bundle: TinyBundle, name: str) -> None:
    change, code = ATTACKS[name]
    document = json.loads(bundle.manifest_bytes)
    change(document)
    assert code_of(lambda: parse_manifest(json.dumps(document).encode())) == code


def test_two_artifacts_of_one_name(bundle: TinyBundle) -> None:
    document = json.loads(bundle.manifest_bytes)
    document["artifacts"].append(document["artifacts"][0])
    assert code_of(lambda: parse_manifest(json.dumps(document).encode())) == "bad-manifest"


def test_versions(bundle: TinyBundle) -> None:
    def active(name: str, version: int) -> wire.Active:
        return wire.Active(bundle.variant(), name, version, "", "now")

    check_version(bundle.manifest, None, False)
    check_version(bundle.manifest, active("tiny", 1), False)
    check_version(bundle.manifest, active("other", 9), False)
    check_version(bundle.manifest, active("tiny", 9), True)
    assert code_of(lambda: check_version(bundle.manifest, active("tiny", 2), False)) == "older-version"
