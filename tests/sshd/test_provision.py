"""Provisioning an ordinary account over a real sshd, by the very command, where the device has no network and no ensurepip."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevit.cli import run_cli
from edgevit.fleet.connect import connect, trust
from edgevit.fleet.inventory import Target, add_target
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.places import fleet_path
from edgevit.transport.prompts import NoPrompts
from tests.support.sshd import Account, target_of
from tests.support.wheels import ONNXRUNTIME, make_index, repack, use_index

NO_ENSUREPIP = "raise ModuleNotFoundError('No module named ensurepip')\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of what is installed here: onnxruntime with all it needs, Pillow, pip; no LiteRT."""
    folder = tmp_path_factory.mktemp("index")
    return make_index(folder, [(repack(name, folder).path, "") for name in ("pip", "pillow", *ONNXRUNTIME)])


@pytest.fixture
def cut_off(account: Account, server: LoopbackSshd, tmp_path: Path) -> Iterator[Target]:
    """A target whose Python runs in a network of its own, which leads nowhere, and has no ensurepip."""
    if "{}.{}".format(*sys.version_info[:2]) != version_of(account.python):
        pytest.skip(f"the account's Python is {version_of(account.python)}, the packages here are for another")
    folder = account.home / "bin"
    (folder / "ensurepip").mkdir(parents=True, exist_ok=True)
    (folder / "ensurepip" / "__init__.py").write_text(NO_ENSUREPIP)
    hidden = subprocess.run(
        [account.python, "-c", "import ensurepip, os; print(os.path.dirname(ensurepip.__file__))"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    hide = f"mount --bind {folder / 'ensurepip'} {hidden} && " if hidden else ""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec unshare -rnm sh -c \'{hide}exec "$@"\' sh {account.python} "$@"\n')
    python.chmod(0o755)
    for path in (folder, folder / "ensurepip", folder / "ensurepip" / "__init__.py", python):
        path.chmod(path.stat().st_mode | stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0))
    target = target_of(server, account, "cut-off", python=str(python), root=str(account.home / "cut-off"))
    trust(target, NoPrompts(), server.fingerprint)
    works = outside(account, [str(python), "-c", "print('there')"])
    if works.stdout.strip() != "there":
        pytest.skip(f"no network namespace for an ordinary user here: {works.stderr.strip()[-200:]}")
    add_target(fleet_path(), target)
    yield target
    shutil.rmtree(target.root, ignore_errors=True)


def version_of(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def outside(account: Account, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """A program as the account."""
    import pwd

    entry = pwd.getpwnam(account.name)
    as_account: dict[str, Any] = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if account.ordinary else {}
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", **as_account)


def snapshot(folder: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*") if not p.name.endswith(".pyc") and p.name != "__pycache__"}


def test_provisioned_without_a_network_proven_by_an_inference_gone_without_a_trace(
    cut_off: Target,
    account: Account,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_index(monkeypatch, address)
    python = cut_off.python
    reach = outside(account, [python, "-c", "import socket; socket.create_connection(('127.0.0.1', 22), 2)"])
    assert reach.returncode != 0, "the device reaches a network"
    usual = outside(account, [python, "-m", "venv", str(account.home / "usual")])
    assert usual.returncode != 0 and "ensurepip" in usual.stdout + usual.stderr, "this Python has ensurepip after all"
    subprocess.run(["rm", "-rf", str(account.home / "usual")], check=True)
    before = snapshot(account.home)

    def edgevit(*words: str) -> Any:
        capsys.readouterr()
        assert run_cli(["target", *words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)["targets"][0]

    planned = edgevit("provision", "cut-off", "--dry-run")
    assert planned["made"] is None and not planned["up_to_date"] and not planned["runtimes"]
    assert {w["package"] for w in planned["wheels"]} == {"pip", *ONNXRUNTIME}
    assert planned["send_bytes"] == sum(w["bytes"] for w in planned["wheels"]) > 10**7
    assert any("litert: " in reason and "no wheel of ai-edge-litert" in reason for reason in planned["without"])
    assert not (Path(cut_off.root) / "venv").exists() and not list((Path(cut_off.root) / "blobs").glob("*"))
    with connect(cut_off, NoPrompts()) as agent:
        assert agent.signers() == ()

    done = edgevit("provision", "cut-off")
    assert done["made"] and done["sent_bytes"] == planned["send_bytes"]
    assert [r["runtime"] for r in done["runtimes"]] == ["onnxruntime"]
    facts = edgevit("probe", "cut-off")["facts"]
    assert facts["runtimes"][0]["providers"][0] == {"name": "CPUExecutionProvider", "proven": True, "detail": ""}
    assert facts["signers"] == 1

    # The second time nothing happens; where no index answers any more, what was resolved counts.
    again = edgevit("provision", "cut-off")
    assert (again["made"], again["sent_bytes"], again["runtimes"]) == (False, 0, done["runtimes"])
    grown = edgevit("provision", "cut-off", "--with-pillow")
    assert grown["made"] and grown["sent_bytes"] < planned["send_bytes"] / 2
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    left = edgevit("provision", "cut-off")
    assert left["up_to_date"] and any("does not answer" in reason for reason in left["without"])
    kept = edgevit("provision", "cut-off", "--with-pillow", "--dry-run")
    assert kept["up_to_date"] and "pillow>=10" in kept["requirements"]

    assert run_cli(["target", "unprovision", "cut-off", "--yes"]) == 0
    assert snapshot(account.home) == before


def test_a_device_without_any_wheel_is_refused_before_anything_is_sent(
    cut_off: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    use_index(monkeypatch, (tmp_path / "empty").as_uri())
    assert run_cli(["target", "provision", "cut-off"]) == 3
    said = capsys.readouterr().err
    assert "can be had: litert: the package index: no wheel of" in said and "onnxruntime: " in said, said
    assert not (Path(cut_off.root) / "venv").exists()
