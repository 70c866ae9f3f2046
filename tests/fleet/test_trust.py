"""Who may sign, and what is never told: rotation and revocation on real devices, and a planted secret that turns up nowhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgevit.bundle import open_bundle
from edgevit.cli import run_cli
from edgevit.errors import DeviceRefused
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import add_target
from edgevit.places import audit_path, config_dir, fleet_path
from edgevit.transport.prompts import NoPrompts, TerminalPrompts
from tests.support import agent_bundle as tiny
from tests.support.agent_bundle import Signer, make_signer
from tests.support.fleet import Device
from tests.support.sshd import PASSWORD


def checked(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, Any]:
    capsys.readouterr()
    run_cli(["fleet", "check", name, "--json"])
    (row,) = json.loads(capsys.readouterr().out)["targets"]
    return dict(row)


def test_a_revoked_signers_bundles_are_refused_and_what_is_active_stays_and_is_reported(
    box: Device, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, successor = box.target.name, make_signer(tmp_path / "keys", "successor")
    old, held, unsent = (tiny.make_bundle(signer, version=v).write(tmp_path / f"old-{v}") for v in (1, 2, 3))
    new = tiny.make_bundle(successor, version=4).write(tmp_path / "new")
    assert run_cli(["deploy", str(old), name]) == 0
    with connect(box.target, NoPrompts()) as agent:
        agent.install(open_bundle(held, None))
    assert run_cli(["key", "allow", name, "--sign-key", f"{successor.key}.pub", "--signer", "next@lab"]) == 0
    assert run_cli(["key", "revoke", name, "--sign-key", f"{signer.key}.pub"]) == 0
    assert f"{name}: revoked; 1 signer allowed" in capsys.readouterr().out

    with connect(box.target, NoPrompts()) as agent:
        active = agent.probe(quick=True).active
        assert active is not None and active.bundle_version == 1
        with pytest.raises(DeviceRefused) as install:
            agent.install(open_bundle(unsent, None))
        from device_agents.wire import Variant

        with pytest.raises(DeviceRefused) as activate:
            agent.activate(
                Variant(open_bundle(held, None).digest, "tiny-onnx-fp32", "onnxruntime", "CPUExecutionProvider", 1), "test"
            )
        assert {install.value.code, activate.value.code} == {"unknown-signer"}
        after = agent.probe(quick=True)
        assert after.active == active and after.active_refused.startswith("unknown-signer")
    (found,) = [f for f in checked(capsys, name)["findings"] if "is active" in f["message"]]
    assert found["severity"] == "warning" and "signed by a key that may not sign for it any more" in found["message"]

    assert run_cli(["deploy", str(new), name]) == 0
    assert not any("is active" in f["message"] for f in checked(capsys, name)["findings"])
    with connect(box.target, NoPrompts()) as agent, pytest.raises(DeviceRefused) as back:
        agent.rollback()
    assert back.value.code == "unknown-signer"
    run_cli(["fleet", "audit", name, "--json"])
    actions = [entry["action"] for entry in json.loads(capsys.readouterr().out)["entries"]]
    assert actions[:3] == ["deploy", "key allow", "key revoke"]


def test_one_allowed_signers_file_for_a_whole_fleet(
    fleet: list[Device], signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [make_signer(tmp_path / "keys", f"k{i}") for i in range(2)]
    file = tmp_path / "allowed_signers"
    file.write_text("# the lab\n" + "".join(s.line(f"ann{i}@lab") + "\n" for i, s in enumerate(others)))
    names = [d.target.name for d in fleet[:2]]
    assert run_cli(["key", "allow", *names, "--signers", str(file), "--replace"]) == 0
    for device in fleet[:2]:
        with connect(device.target, NoPrompts()) as agent:
            assert agent.signers() == tuple(s.line(f"ann{i}@lab") for i, s in enumerate(others))
    file.write_text("nonsense\n")
    assert run_cli(["key", "allow", names[0], "--signers", str(file)]) == 2
    assert f"{file}:1" in capsys.readouterr().err
    assert run_cli(["key", "revoke", names[0]]) == 2
    assert run_cli(["key", "revoke", names[0], "--fingerprint", "MD5:00"]) == 2


def test_a_changed_host_key_stops_every_command_with_both_fingerprints_and_queues_nothing(
    box: Device, signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, before = box.target.name, box.server.fingerprint
    bundle = tiny.make_bundle(signer).write(tmp_path / "bundle")
    kept = {p: p.read_bytes() for p in (box.server.host_key, box.server.host_key.with_name(box.server.host_key.name + ".pub"))}
    box.server.stop()
    for path in kept:
        path.unlink()
    box.server.start()
    try:
        after = box.server.fingerprint
        assert after != before
        for words in (["deploy", str(bundle)], ["bench", str(bundle), "--detach"], ["collect"], ["fleet", "check"]):
            assert run_cli([*words, name] if words[0] != "bench" else ["bench", str(bundle), name, "--detach"]) == 3, words
            said = capsys.readouterr()
            flat = "".join((said.out + said.err).split())
            assert before in flat and after in flat, words
        assert not list((tmp_path / "edgevit").rglob("outbox/*.json"))
        assert not list(box.root.glob("bundles/*"))
    finally:
        box.server.stop()
        for path, data in kept.items():
            path.write_bytes(data)
        box.server.start()


# ---- a planted secret ------------------------------------------------------------------------------------------------

TOKEN = "tk-5f1d9e3b7a64420c"


class Typed(TerminalPrompts):
    """A person who types the password."""

    def secret(self, text: str) -> str | None:
        return PASSWORD


@contextmanager
def watching_processes() -> Iterator[set[bytes]]:
    """Every command line of every process while the block runs, as `ps` would show them."""
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def files_below(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def test_planted_secrets_turn_up_in_no_message_log_process_list_or_database(
    box: Device, signer: Signer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole life of a target: a password typed at login, a private signing key, a token in the URL of a package index."""
    if not box.account.ordinary:
        pytest.fail("an account with a known password is needed: run the tests as root, or in a container")
    from tests.support.sshd import running_sshd, target_of

    monkeypatch.setenv("PIP_INDEX_URL", f"https://someone:{TOKEN}@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(TerminalPrompts, "secret", Typed.secret)
    private = signer.key.read_text().splitlines()[2]
    bundle = tiny.make_bundle(signer).write(tmp_path / "bundle")
    words = "PasswordAuthentication yes\nPubkeyAuthentication no\n"
    with running_sshd(box.account, extra=words) as server, watching_processes() as seen:
        target = target_of(server, box.account, "typed", key=None, root=str(box.root))
        from edgevit.fleet.connect import trust

        trust(target, NoPrompts(), server.fingerprint)
        add_target(fleet_path(), target)
        codes = [
            run_cli(argv)
            for argv in (
                ["fleet", "check", "typed"],
                ["target", "provision", "typed", "--upgrade"],
                ["key", "allow", "typed"],
                ["deploy", str(bundle), "typed"],
                ["bench", str(bundle), "typed", "--plan", "quick", "--detach"],
                ["collect", "typed", "--wait"],
                ["rollback", "typed"],
                ["fleet", "audit"],
            )
        ]
        log = server.log.read_text()
    said = capfd.readouterr()
    assert codes[2:6] == [0, 0, 0, 0], (codes, said.err)
    assert codes[1] != 0, "the index was to be unreachable, so that its error is looked at too"
    assert audit_path().exists() and any(b"ssh" in line for line in seen)
    own = {signer.key}
    everything = {
        "messages": (said.out + said.err).encode(),
        "sshd's log": log.encode(),
        "process list": b"\n".join(seen),
        **{str(p): data for p, data in files_below(config_dir().parent, box.root) if p not in own},
    }
    for secret in (PASSWORD, private, TOKEN):
        found = [where for where, data in everything.items() if secret.encode() in data]
        assert found == [], f"{secret[:6]}… is in {found}"
