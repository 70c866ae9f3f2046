"""Bundles into a real agent process: what arrives whole appears, and nothing else does."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from device_agents.root import temp_name
from tests.support.agent_bundle import (
    CASES,
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    install_request,
    make_bundle,
    make_signer,
    replace_signature,
    tiny_onnx,
)


def refused(call: Any) -> AgentRefused:
    with pytest.raises(AgentRefused) as caught:
        call()
    return caught.value


def activate(agent: AgentProcess, bundle: TinyBundle, **more: Any) -> Any:
    return agent.call("activate", stdin={"variant": wire.encode(bundle.variant()), "policy": "test", **more})


def store_files(agent: AgentProcess) -> set[str]:
    return {str(p.relative_to(agent.root)) for p in agent.root.rglob("*") if p.is_file() and p.parent.name != "agent"}


def test_a_variant_that_misses_its_golden_outputs_is_never_activated(
    agent: AgentProcess, signer: Signer, bundle: TinyBundle
) -> None:
    agent.install(bundle)
    active = activate(agent, bundle)["active"]
    other = make_bundle(signer, version=2, onnx_model=tiny_onnx(seed=5))
    agent.install(other)
    told = refused(lambda: activate(agent, other))
    assert told.code == "golden-mismatch" and "tiny-onnx-fp32" in told.message
    assert agent.call("probe", "--quick")["active"] == active


def test_install_then_again_sends_nothing(agent: AgentProcess, bundle: TinyBundle) -> None:
    wanted = [wire.encode(b) for b in bundle.manifest.blobs()]
    before = agent.call("have", stdin={"blobs": wanted})
    assert set(before["missing"]) == set(bundle.blobs) and before["free_bytes"] > 0
    total = sum(len(b) for b in bundle.blobs.values())
    assert agent.install(bundle) == {"bundle": bundle.digest, "installed": True, "received_bytes": total}
    assert agent.call("have", stdin={"blobs": wanted})["missing"] == []
    assert agent.install(bundle) == {"bundle": bundle.digest, "installed": False, "received_bytes": 0}
    for path in agent.root.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path} has mode {mode:o}"


def test_activate_rollback(agent: AgentProcess, signer: Signer, bundle: TinyBundle) -> None:
    assert refused(lambda: activate(agent, bundle)).code == "not-installed"
    assert refused(lambda: agent.call("rollback")).code == "no-active"
    agent.install(bundle)
    first = activate(agent, bundle)
    assert first["changed"] and not activate(agent, bundle)["changed"]
    assert refused(lambda: agent.call("rollback")).code == "no-previous"
    newer = make_bundle(signer, version=2)
    agent.install(newer)
    second = activate(agent, newer)
    assert second["changed"]
    back = agent.call("rollback")["active"]
    assert back["bundle_version"] == 1
    assert back["activated_at"] > second["active"]["activated_at"], "it is active since it was gone back to, not since before"
    assert agent.call("probe", "--quick")["active"] == back
    assert agent.call("rollback")["active"]["bundle_version"] == 2
    assert refused(lambda: activate(agent, bundle)).code == "older-version"
    assert activate(agent, bundle, allow_older=True)["changed"]


def test_an_older_version_is_not_even_received(agent: AgentProcess, signer: Signer, bundle: TinyBundle) -> None:
    newer = make_bundle(signer, version=2)
    agent.install(newer)
    activate(agent, newer)
    assert refused(lambda: agent.install(bundle)).code == "older-version"
    assert agent.install(bundle, allow_older=True)["installed"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"artifact": "nothing"}, "no-such-artifact"),
        ({"runtime": "litert"}, "does-not-fit"),
        ({"threads": 0}, "bad-request"),
        ({"bundle": "../../x"}, "bad-request"),
    ],
)
def test_activate_refuses(agent: AgentProcess, bundle: TinyBundle, change: dict[str, Any], code: str) -> None:
    agent.install(bundle)
    variant = {**wire.encode(bundle.variant()), **change}
    assert refused(lambda: agent.call("activate", stdin={"variant": variant, "policy": ""})).code == code


def test_signatures(tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    agent = AgentProcess(tmp_path / "root").upload()
    assert refused(lambda: agent.install(bundle)).code == "no-signers"
    agent.allow(make_signer(tmp_path, "other"))
    assert refused(lambda: agent.install(bundle)).code == "unknown-signer"
    agent.allow(signer)
    for bad in (
        bundle.signature + b"\n",
        bundle.signature.replace(b"\n", b"\r\n"),
        b"x",
        make_bundle(signer, version=9).signature,
    ):
        assert refused(lambda b=bad: agent.install(replace_signature(bundle, b))).code == "bad-signature"
    assert agent.call("have", stdin={"blobs": [wire.encode(b) for b in bundle.manifest.blobs()]})["partial"] == {}
    assert store_files(agent) == {"allowed_signers"}, "something was accepted before the signature held"


def test_manifests_refused_by_the_agent(agent: AgentProcess, signer: Signer) -> None:
    def with_schema(document: dict[str, Any]) -> None:
        document["schema"] = "edgevit.bundle/2"

    def with_dots(document: dict[str, Any]) -> None:
        document["artifacts"][0]["name"] = "../x"

    assert refused(lambda: agent.install(make_bundle(signer, change=with_schema))).code == "newer-schema"
    assert refused(lambda: agent.install(make_bundle(signer, change=with_dots))).code == "bad-manifest"


def test_an_endless_manifest_is_cut_off(agent: AgentProcess) -> None:
    """A host that announces a manifest of a gigabyte is refused after a few megabytes, not when memory is full."""
    process = agent.start("install")
    assert process.stdin and process.stdout
    sent = 0
    try:
        while sent < 1 << 30:
            process.stdin.write(b"A" * (1 << 20))
            sent += 1 << 20
    except BrokenPipeError:
        pass
    assert json.loads(process.stdout.read().splitlines()[-1])["refusal"]["code"] == "bad-request"
    assert sent < 64 << 20
    process.kill()
    process.wait()


def test_wrong_bytes_are_refused_and_removed(agent: AgentProcess, bundle: TinyBundle) -> None:
    for sha256, data in bundle.blobs.items():
        flipped = bytes([data[0] ^ 1]) + data[1:]
        error = refused(lambda s=sha256, f=flipped: agent.install(bundle, blobs={**bundle.blobs, s: f}))
        assert error.code == "digest-mismatch" and sha256 in error.message
        assert not (agent.root / "blobs" / f"{sha256}.part").exists() and not (agent.root / "blobs" / sha256).exists()
        assert refused(lambda: activate(agent, bundle)).code == "not-installed"
        for whole in (agent.root / "blobs").iterdir():
            whole.unlink()  # blobs before the wrong one arrived well and would not be asked for again


def test_a_broken_link_resumes_where_it_stopped(agent: AgentProcess, bundle: TinyBundle) -> None:
    process = agent.start("install")
    assert process.stdin and process.stdout
    process.stdin.write(install_request(bundle))
    process.stdin.flush()
    need = json.loads(process.stdout.readline())
    assert need["type"] == "need"
    first = need["blobs"][0]["sha256"]
    half = len(bundle.blobs[first]) // 2
    process.stdin.write(bundle.blobs[first][:half])
    process.stdin.close()
    last = json.loads(process.stdout.read().splitlines()[-1])
    process.wait()
    assert last["refusal"]["code"] == "interrupted"
    blobs = [wire.encode(b) for b in bundle.manifest.blobs()]
    assert agent.call("have", stdin={"blobs": blobs})["partial"] == {first: half}
    total = sum(len(b) for b in bundle.blobs.values())
    assert agent.install(bundle)["received_bytes"] == total - half
    assert activate(agent, bundle)["changed"]


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_damaged_part_is_noticed(agent: AgentProcess, bundle: TinyBundle, where: str) -> None:
    sha256, data = next(iter(bundle.blobs.items()))
    part = agent.root / "blobs" / f"{sha256}.part"
    agent.call("gc")  # makes the folders
    part.write_bytes(b"\0" * 10 if where == "start" else data + b"more than the blob has")
    if where == "start":
        assert refused(lambda: agent.install(bundle)).code == "digest-mismatch"
        assert not part.exists()
    assert agent.install(bundle)["installed"]


def test_a_damaged_blob_is_refused_and_sent_again(agent: AgentProcess, bundle: TinyBundle) -> None:
    agent.install(bundle)
    for sha256 in bundle.blobs:
        path = agent.root / "blobs" / sha256
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(bytes(data))
        assert refused(lambda: activate(agent, bundle)).code == "blob-damaged"
        assert agent.install(bundle)["received_bytes"] == len(data)
    path.unlink()
    assert refused(lambda: activate(agent, bundle)).code == "blob-missing"
    agent.install(bundle)
    assert activate(agent, bundle)["changed"]


def test_symbolic_links_in_the_store_are_refused(agent: AgentProcess, bundle: TinyBundle, tmp_path: Path) -> None:
    agent.install(bundle)
    sha256, data = next(iter(bundle.blobs.items()))
    blob = agent.root / "blobs" / sha256
    (tmp_path / "elsewhere").write_bytes(data)
    blob.unlink()
    blob.symlink_to(tmp_path / "elsewhere")
    assert refused(lambda: activate(agent, bundle)).code == "blob-damaged"
    assert agent.install(bundle)["received_bytes"] == len(data)
    assert not blob.is_symlink() and (tmp_path / "elsewhere").read_bytes() == data
    manifest = agent.root / "bundles" / bundle.digest / "manifest.json"
    manifest.rename(tmp_path / "manifest")
    manifest.symlink_to(tmp_path / "manifest")
    assert refused(lambda: activate(agent, bundle)).code == "io-error"
    agent.install(bundle)
    assert not manifest.is_symlink() and activate(agent, bundle)["changed"]


def test_a_folder_that_is_a_link_is_refused(agent: AgentProcess, bundle: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    agent.call("gc")
    (agent.root / "blobs").rmdir()
    (agent.root / "blobs").symlink_to(tmp_path / "elsewhere")
    assert refused(lambda: agent.install(bundle)).code == "io-error"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_part_that_is_a_link_is_not_written_through(agent: AgentProcess, bundle: TinyBundle, tmp_path: Path) -> None:
    agent.call("gc")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for sha256 in bundle.blobs:
        (agent.root / "blobs" / f"{sha256}.part").symlink_to(victim)
    assert agent.install(bundle)["installed"]
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("seed", range(12))
def test_kill_9_at_a_random_moment_leaves_nothing_half(agent: AgentProcess, signer: Signer, seed: int) -> None:
    """The active bundle verifies after every kill, and the next install carries on."""
    rng = random.Random(seed)
    old = make_bundle(signer, version=1)
    agent.install(old)
    activate(agent, old)
    new = make_bundle(signer, version=2, extra_blob=json.dumps(["x" * 4_000_000, seed]).encode())
    process = agent.start("install")
    assert process.stdin and process.stdout
    deadline = time.monotonic() + rng.uniform(0.02, 0.35)
    feeder = subprocess.Popen(
        ["sleep", str(max(deadline - time.monotonic(), 0))], stdout=subprocess.DEVNULL
    )  # the clock of the kill, so that the moment does not depend on what the agent says
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    _feed_until(feeder, process, new)
    process.kill()
    process.wait()
    feeder.wait()
    assert agent.call("activate", stdin={"variant": wire.encode(old.variant()), "policy": ""})["changed"] is False
    bundles = [p.name for p in (agent.root / "bundles").iterdir() if not p.name.startswith(".tmp-")]
    assert set(bundles) <= {old.digest, new.digest}
    agent.install(new)
    assert activate(agent, new)["changed"]
    agent.call("gc")
    assert not list(agent.root.rglob(".tmp-*")), "a temporary of the killed agent is still there"


def _feed_until(clock: subprocess.Popen[bytes], process: subprocess.Popen[bytes], bundle: TinyBundle) -> None:
    """Send request and blobs without ever blocking, until the clock process ends."""
    assert process.stdin and process.stdout
    pending, heard, answered = install_request(bundle), b"", False
    while clock.poll() is None:
        try:
            if pending:
                pending = pending[os.write(process.stdin.fileno(), pending[:65536]) :]
            heard += os.read(process.stdout.fileno(), 65536)
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return
        if not answered and b"\n" in heard and b'"need"' in heard:
            answered = True
            line = next(json.loads(x) for x in heard.splitlines() if b'"need"' in x)
            pending += b"".join(bundle.blobs[n["sha256"]][n["offset"] :] for n in line["blobs"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB; only root may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, signer: Signer) -> None:
    agent = AgentProcess(small_disk / "root").upload()
    agent.allow(signer)
    small = make_bundle(signer)
    agent.install(small)
    activate(agent, small)
    big = make_bundle(signer, version=2, extra_blob=os.urandom(9 << 20))
    error = refused(lambda: agent.install(big))
    assert error.code == "no-space" and "spare" in error.message
    assert not list((small_disk / "root" / "blobs").glob("*.part")), "a byte was taken in before the space was looked at"
    signers = agent.call("signers")["lines"]
    (small_disk / "filler").write_bytes(b"\0" * small_disk_free(small_disk))
    assert refused(lambda: agent.call("allow", stdin={"lines": [make_line(signer)], "replace": True})).code == "no-space"
    assert agent.call("signers")["lines"] == signers
    (small_disk / "filler").unlink()
    assert activate(agent, small)["changed"] is False, "the active bundle suffered from a full disk"


def make_line(signer: Signer) -> str:
    return signer.line("x" * 5000)  # over a page, so that no rest of one can take it


def small_disk_free(place: Path) -> int:
    s = os.statvfs(place)
    return s.f_bavail * s.f_frsize


def test_signers_are_added_once_and_replaced_whole(agent: AgentProcess, signer: Signer, tmp_path: Path) -> None:
    other = make_signer(tmp_path, "other")
    lines = [signer.line(), other.line("ann")]
    assert agent.call("allow", stdin={"lines": lines, "replace": False}) == {"signers": 2, "added": 1, "removed": 0}
    assert agent.call("allow", stdin={"lines": lines, "replace": False}) == {"signers": 2, "added": 0, "removed": 0}
    assert refused(lambda: agent.call("allow", stdin={"lines": ["nonsense"], "replace": True})).code == "bad-request"
    assert agent.call("signers")["lines"] == lines
    replaced = agent.call("allow", stdin={"lines": [other.line("ann")], "replace": True})
    assert replaced == {"signers": 1, "added": 1, "removed": 1}


def test_a_damaged_record_of_what_is_active_can_be_written_anew(agent: AgentProcess, signer: Signer) -> None:
    """A device whose card spoilt that one file must not need a hand there; what was active is lost, so older is allowed."""
    bundle = make_bundle(signer)
    agent.allow(signer)
    agent.install(bundle)
    activate(agent, bundle)
    (agent.root / "active.json").write_bytes(b"\0" * 300)
    told = refused(lambda: activate(agent, bundle))
    assert told.code == "io-error" and "--allow-older" in told.message
    agent.install(bundle, allow_older=True)
    request = {"variant": wire.encode(bundle.variant()), "policy": "test", "allow_older": True}
    assert agent.call("activate", stdin=request)["changed"] is True
    assert activate(agent, bundle)["changed"] is False


def test_gc_keeps_active_previous_newest_and_nothing_else(agent: AgentProcess, signer: Signer) -> None:
    bundles = [make_bundle(signer, version=v, extra_blob=f'["{v}"]'.encode()) for v in (1, 2, 3, 4)]
    for bundle in bundles:
        agent.install(bundle)
    for bundle in bundles[1:3]:
        activate(agent, bundle)
    assert agent.call("gc") == {"removed_bundles": 1, "removed_blobs": 1, "freed_bytes": 5}
    assert agent.call("gc") == {"removed_bundles": 0, "removed_blobs": 0, "freed_bytes": 0}
    assert agent.call("rollback")["active"]["bundle_version"] == 2
    assert refused(lambda: activate(agent, bundles[0])).code == "not-installed"


def test_gc_leaves_alone_what_others_are_writing(agent: AgentProcess, bundle: TinyBundle) -> None:
    """A result on its way into the spool, an environment's wheels: the process that their names tell of is at work."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = [agent.root / folder / temp_name() for folder in ("spool", "queue")]
    dead = [agent.root / "spool" / f".tmp-{pid}-00" for pid in (f"{ended.pid}-1", f"{os.getpid()}-1", "x")]
    for path in (*mine, *dead):
        path.write_bytes(b"half")
    scratch = agent.root / temp_name()
    scratch.mkdir()
    for path in (*mine, scratch):
        os.utime(path, (0, 0))  # a board without a battery: the clock was set while it was at work
    agent.call("gc")
    assert all(path.exists() for path in (*mine, scratch)), "the writer's rename would fail"
    assert not any(path.exists() for path in dead), "its process is gone, also where its number is another's by now"


def test_uninstall_takes_what_is_named_and_nothing_that_is_used(agent: AgentProcess, signer: Signer) -> None:
    bundles = [make_bundle(signer, version=v, extra_blob=f'["{v}"]'.encode()) for v in (1, 2, 3, 4)]
    for bundle in bundles:
        agent.install(bundle)
    for bundle in bundles[:2]:
        activate(agent, bundle)
    digests = [bundle.digest for bundle in bundles]
    told = agent.call("uninstall", stdin={"bundles": [*digests[:3], digests[2], "0" * 64]})
    assert told == {"removed_bundles": 1, "removed_blobs": 1, "freed_bytes": 5}, "not one blob that others have too"
    assert {b["bundle"] for b in agent.call("probe", "--quick")["bundles"]} == {*digests} - {digests[2]}
    assert agent.call("uninstall", stdin={"bundles": [digests[2]]})["removed_bundles"] == 0
    assert agent.call("rollback")["active"]["bundle_version"] == 1
    assert activate(agent, bundles[3])["changed"] is True
    for wrong in ({}, {"bundles": "x"}, {"bundles": ["../active.json"]}, {"bundles": [1]}):
        assert refused(lambda wrong=wrong: agent.call("uninstall", stdin=wrong)).code == "bad-request"


def test_requests_that_are_none(agent: AgentProcess) -> None:
    for command in ("have", "activate", "allow", "install", "uninstall", "provision", "predict", "submit"):
        for data in (b"", b"{", b"[]\n", b'{"x":1}\n', b"\xff\n"):
            assert refused(lambda c=command, d=data: agent.call(c, stdin=d)).code in ("bad-request", "bad-job")
    assert refused(lambda: agent.call("format-disk")).code == "bad-request"
    assert refused(lambda: agent.call("ack", "../x")).code == "bad-request"
    assert refused(lambda: agent.call("ack")).code == "bad-request"


def test_the_launcher_refuses_another_agent(agent: AgentProcess) -> None:
    pyz = next((agent.root / "agent").glob("*.pyz"))
    data = bytearray(pyz.read_bytes())
    data[-1] ^= 1
    pyz.write_bytes(bytes(data))
    assert subprocess.run(agent.argv("signers"), capture_output=True).returncode == 97
    pyz.unlink()
    assert subprocess.run(agent.argv("signers"), capture_output=True).returncode == 97


def test_modules_in_the_current_folder_are_not_imported(agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "hashlib.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(agent.argv("signers"), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_unprovision_removes_its_own_and_nothing_else(agent: AgentProcess, tmp_path: Path) -> None:
    other = AgentProcess(tmp_path / "not-an-agent")
    assert agent.call("unprovision") == {"removed": True} and not agent.root.exists()
    other.upload()
    (other.root / "agent").rename(other.root / "kept")
    assert subprocess.run(other.argv("unprovision"), capture_output=True).returncode == 97
    assert (other.root / "kept").exists()


def test_the_committed_model_is_what_its_note_says() -> None:
    assert (CASES / "tiny.tflite").read_bytes()[4:8] == b"TFL3"
