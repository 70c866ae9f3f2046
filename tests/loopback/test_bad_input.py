"""Bad input on the way to a device, through the command line and a real agent: exit code, message, next command, and that
what was there before is still there."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from edgevit import places, signing
from tests.support.agent_bundle import AgentProcess, Signer, make_bundle, make_job, make_signer, tiny_onnx
from tests.support.cli import Cli, active
from tests.support.golden_faults import GOLDEN_FAULTS


@pytest.fixture
def good(operator: Signer, tmp_path: Path) -> Path:
    """A right bundle of version 2."""
    return make_bundle(operator, version=2).write(tmp_path / "good")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_blob(bundle: Path) -> None:
    flip(min((bundle / "blobs").iterdir()), 5)


def flip_manifest(bundle: Path) -> None:
    flip(bundle / "manifest.json", (bundle / "manifest.json").read_bytes().index(b'"tiny"') + 2)


def flip_signature_spelling(bundle: Path) -> None:
    flip(bundle / "manifest.json.sig", 0)


def end_signature_twice(bundle: Path) -> None:
    path = bundle / "manifest.json.sig"
    path.write_bytes(path.read_bytes() + b"\n")


def another_manifests_signature(bundle: Path) -> None:
    path = bundle / "manifest.json.sig"
    path.write_bytes(Signer(signing.default_key_path()).sign(b"another manifest"))


def drop_signature(bundle: Path) -> None:
    (bundle / "manifest.json.sig").unlink()


def link_blob(bundle: Path) -> None:
    blob = min((bundle / "blobs").iterdir())
    elsewhere = bundle.parent / "elsewhere"
    blob.rename(elsewhere)
    blob.symlink_to(elsewhere)


def gigabyte_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 1 << 30)


AGAIN = "copy or build the bundle again"
BUILD_AGAIN = "edgevit verify BUNDLE; then build or copy it again"
# what is done to the bundle → exit code, message, next command. 1: refused here, 3: refused by the device.
DAMAGE: dict[Callable[[Path], None], tuple[int, str, str]] = {
    flip_blob: (1, "its SHA-256 is", AGAIN),
    flip_manifest: (3, "does not belong to this manifest", BUILD_AGAIN),
    flip_signature_spelling: (1, "bad-signature", AGAIN),
    end_signature_twice: (1, "not an SSH signature in canonical form", AGAIN),
    another_manifests_signature: (3, "does not belong to this manifest", BUILD_AGAIN),
    drop_signature: (1, "manifest.json.sig: missing", AGAIN),
    link_blob: (1, "not a regular file", AGAIN),
    gigabyte_manifest: (1, "1,073,741,824 bytes, at most", AGAIN),
}


def test_damaged_bundles_are_refused_and_the_active_one_stays(cli: Cli, good: Path, tmp_path: Path) -> None:
    assert cli("deploy", good, "local").code == 0
    before = active()
    for spoil, (code, message, hint) in DAMAGE.items():
        bad = tmp_path / spoil.__name__
        shutil.copytree(good, bad)
        spoil(bad)
        cli("deploy", bad, "local").refused(code, message, hint)
        cli("verify", bad).refused(1, message, AGAIN)
        assert active() == before, spoil.__name__
    assert cli("deploy", good, "local").code == 0


def with_schema(document: dict[str, Any]) -> None:
    document["schema"] = "edgevit.bundle/2"


def with_dots(document: dict[str, Any]) -> None:
    document["golden"]["blob"]["sha256"] = "../../../../etc/passwd"


def with_absolute_path(document: dict[str, Any]) -> None:
    document["artifacts"][0]["blob"]["sha256"] = "/etc/passwd"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (with_schema, "the manifest has schema edgevit.bundle/2", "pip install --upgrade edgevit"),
        (with_dots, "bad-manifest", AGAIN),
        (with_absolute_path, "bad-manifest", AGAIN),
    ],
)
def test_signed_manifests_that_are_wrong(
    change: Callable[[dict[str, Any]], None], message: str, hint: str, cli: Cli, operator: Signer, tmp_path: Path
) -> None:
    bad = make_bundle(operator, change=change).write(tmp_path / "bad")
    for command in (["deploy", bad, "local"], ["bench", bad, "local"], ["verify", bad]):
        cli(*command).refused(1, message, hint)


def test_a_stranger_is_refused_until_allowed_by_hand(cli: Cli, good: Path, tmp_path: Path) -> None:
    stranger = make_signer(tmp_path, "stranger")
    foreign = make_bundle(stranger, version=3).write(tmp_path / "foreign")
    assert cli("deploy", good, "local").code == 0
    before = active()
    for command in (["deploy", foreign, "local"], ["bench", foreign, "local", "--plan", "quick"]):
        cli(*command).refused(3, "which may not sign bundles here", "edgevit key allow local (with --sign-key KEY.pub")
    cli("verify", foreign).refused(1, "unknown-signer", "--signers FILE")
    assert active() == before
    assert cli("key", "allow", "local", "--sign-key", f"{stranger.key}.pub").code == 0
    assert cli("deploy", foreign, "local").code == 0, "the command that the hint names does not help"


def test_an_older_version_needs_leave(cli: Cli, good: Path, operator: Signer, tmp_path: Path) -> None:
    older = make_bundle(operator, version=1).write(tmp_path / "older")
    assert cli("deploy", good, "local").code == 0
    cli("deploy", older, "local").refused(3, "tiny has version 1, version 2 is active", "--allow-older")
    assert active()["bundle_version"] == 2
    assert cli("deploy", older, "local", "--allow-older").code == 0
    assert active()["bundle_version"] == 1


def test_wrong_names_and_numbers(cli: Cli, good: Path, operator: Signer, tmp_path: Path) -> None:
    for command in ("deploy", "bench"):
        cli(command, good, "lcoal").refused(2, "did you mean local?", "edgevit target list")
    cli("bench", good, "local", "--threads", 999).refused(2, "--threads 999", "--threads 1 to")
    several = tmp_path / "several"
    for name in ("a", "b"):
        shutil.copytree(good, several / name)
    for command in ("deploy", "bench"):
        cli(command, several, "local").refused(2, "holds 2 bundle(s), not one", f"name one of them: {several}")

    def for_another_board(document: dict[str, Any]) -> None:
        document["artifacts"][0]["fits"] = ["raspberry-pi-5"]

    unfit = make_bundle(operator, version=5, change=for_another_board).write(tmp_path / "unfit")
    for command in ("deploy", "bench"):
        cli(command, unfit, "local").refused(3, "built for raspberry-pi-5, not for", "edgevit build … --for local")


def test_images_that_cannot_be_read(cli: Cli, good: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but not really")
    for image, message in ((tmp_path / "bad.png", "not an image"), (tmp_path / "none.png", "there is no such file")):
        said = cli("predict", good, "local", image)
        assert said.code == 2 and f"{image}: {message}" in said.err and said.out == ""


def test_a_device_without_a_runtime_names_the_command_that_brings_it(cli: Cli, good: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "black.png")
    # The agent uses the environment under its root: here a bare one.
    venv = [sys.executable, "-m", "venv", "--without-pip", str(places.local_root() / "venv")]
    subprocess.run(venv, check=True, timeout=60)
    hint = "edgevit target provision local"
    build_nothing = ["run", "edgevit.digits:digits_vit", "--random-weights", "--recipe", "fp32", "--target", "local"]
    commands = [
        ["deploy", good, "local"],
        ["bench", good, "local"],
        ["predict", good, "local", tmp_path / "black.png"],
        build_nothing,
    ]
    for command in commands:
        cli(*command).refused(3, "local has no inference runtime", hint)
    assert hint in cli("target", "probe", "local").out


# ---- the results database -------------------------------------------------------------------------------------------


def database() -> Path:
    return Path(places.db_url().removeprefix("sqlite:///"))


def test_a_damaged_or_newer_store_is_refused_and_nothing_that_waits_is_lost(
    cli: Cli, good: Path, operator: Signer, tmp_path: Path
) -> None:
    assert cli("bench", good, "local", "--plan", "quick").code == 0
    agent = AgentProcess(places.local_root())
    waiting = make_job(make_bundle(operator, version=2), "it-waits")
    assert agent.call("submit", stdin=wire.encode(waiting))["queued"] is True
    agent.follow("it-waits")  # measured, and never acknowledged
    whole = database().read_bytes()
    commands = [["bench", good, "local", "--plan", "quick"], ["results", "show"], ["results", "list"], ["collect", "local"]]
    for damaged, said in ((whole[: len(whole) // 2], "malformed"), (b"no database at all" * 300, "not a database")):
        database().write_bytes(damaged)
        for command in commands:
            cli(*command).refused(1, said, "move that file away or set EDGEVIT_DB, then edgevit collect")
            assert database().read_bytes() == damaged, f"{command} wrote into a damaged store"
    database().write_bytes(whole)
    with sqlite3.connect(database()) as db:
        db.execute("INSERT INTO edgevit_migrations (number, applied_at) VALUES (9, 'later')")
    db.close()
    for command in commands:
        cli(*command).refused(1, "is of version 9, written by a newer edgevit", "pip install --upgrade edgevit")
    database().rename(tmp_path / "away")  # what the hint says
    assert "it-waits" in cli("collect", "local").out
    assert "tiny-onnx-fp32" in cli("results", "show").out
    assert "nothing waits" in cli("collect", "local").out


def test_a_result_that_cannot_be_read_holds_up_neither_the_others_nor_what_is_measured_next(
    cli: Cli, good: Path, operator: Signer
) -> None:
    """Whole JSON, and no run as this edgevit knows them: of a newer one, or a damaged byte in a name."""
    assert cli("bench", good, "local", "--plan", "quick").code == 0
    agent = AgentProcess(places.local_root())
    for name in ("a-newer", "whole"):
        agent.call("submit", stdin=wire.encode(make_job(make_bundle(operator, version=2), name)))
        agent.follow(name)
    spooled = agent.root / "spool" / "a-newer.run"
    spooled.write_bytes(spooled.read_bytes().replace(b'"attempt"', b'"attempu"', 1))
    said = cli("bench", good, "local", "--plan", "quick")
    assert said.code == 0 and "run a-newer cannot be read" in said.err and f"rm {agent.root}/spool/a-newer.run" in said.err
    assert "tiny-onnx-fp32" in said.out and not (agent.root / "spool" / "whole.run").exists(), "the other one is home"
    cli("collect", "local").refused(3, "run a-newer cannot be read", "pip install --upgrade edgevit")
    assert spooled.exists(), "a newer edgevit could still bring it home"


# ---- golden faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_FAULTS)
def test_wrong_outputs_are_a_failed_row_and_never_a_number(name: str, cli: Cli, operator: Signer, tmp_path: Path) -> None:
    bad = make_bundle(operator, **GOLDEN_FAULTS[name]).write(tmp_path / "bad")
    said = cli("bench", bad, "local", "--plan", "quick", "--json")
    assert said.code == 1, said.err
    (row,) = json.loads(said.out)["rows"]
    assert row["verdict"]["word"] == "failed" and row["failure"].startswith("golden-mismatch: tiny-onnx-fp32 on onnxruntime")
    assert row["p50_ms"] is None and row["top1"] is None and row["n"] == 0
    table = cli("bench", bad, "local", "--plan", "quick")
    assert table.code == 1 and "failed" in table.out and "golden-mismatch" in table.out


def test_a_fault_in_one_artifact_leaves_the_other_measured(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    half = make_bundle(operator, tflite=True, onnx_model=tiny_onnx(zeroed=True)).write(tmp_path / "half")
    said = cli("bench", half, "local", "--plan", "quick", "--json")
    words = {row["artifact"]: row["verdict"]["word"] for row in json.loads(said.out)["rows"]}
    assert said.code == 1 and words["tiny-onnx-fp32"] == "failed" and words["tiny-tflite-fp32"] != "failed", said.out
