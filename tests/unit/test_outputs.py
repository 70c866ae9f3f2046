"""Where files and bundles go: a place that cannot be written is named before any work, and nothing half-written stays."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgevit.cli import run_cli
from edgevit.errors import BundleError, UsageError
from edgevit.outputs import verify_writable_folder, write_whole
from tests.support.agent_bundle import make_bundle, make_signer

BUILD = ["build", "no-such-model", "--random-weights", "--recipe", "fp32", "--profile", "generic-x86-64", "-o"]


@pytest.mark.parametrize(
    "argv", [["report", "-o"], ["results", "export", "--format", "csv", "-o"], ["study", "digits", "--markdown"]]
)
@pytest.mark.parametrize(
    ("place", "said", "hint"),
    [
        ("absent/page", "absent is not there", "mkdir -p .*absent"),
        ("file/page", "file is not a folder", ""),
        (".", "it is a folder", "name a file in it"),
        ("/proc/page", "/proc/page cannot be written: /proc: ", "ls -ld /proc"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_any_work(
    argv: list[str], place: str, said: str, hint: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code = run_cli([*argv, str(tmp_path / place)])
    err = capsys.readouterr().err
    assert code == 2 and "cannot be written" in err and said in err and "\nnext:" in err, err
    with pytest.raises(UsageError) as caught:
        write_whole(tmp_path / place, "text")
    assert re.search(hint, caught.value.hint)
    assert not (home / "data" / "digits").exists(), "the digits were trained before the place was looked at"


@pytest.mark.parametrize("argv", [BUILD, ["study", "digits", "-o"]])
@pytest.mark.parametrize("place", ["file/deep/out", "file", "/proc/out"])
def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    argv: list[str], place: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code = run_cli([*argv, str(tmp_path / place)])
    err = capsys.readouterr().err
    assert code == 2 and "cannot be written" in err and "\nnext:" in err, err
    assert "no-such-model" not in err, "the model was looked for before the place was"


def test_a_place_that_holds_something_else_is_told_before_any_work(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle")
    assert run_cli([*BUILD, str(bundle)]) == 2
    err = capsys.readouterr().err
    assert "not 'no-such-model.fp32'" in err and "next:  give another -o DIR" in err and "no timm model" not in err, err


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    verify_writable_folder(tmp_path / "a" / "b")
    write_whole(tmp_path / "page.html", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "text"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("old")

    def full(path: Path, text: str, **_: Any) -> Any:
        path.write_bytes(text[:1].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="No space left on device") as caught:
        write_whole(tmp_path / "page.html", "new")
    assert caught.value.hint.startswith("df -h")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"] and (tmp_path / "page.html").read_text() == "old"


def test_a_disk_that_turned_read_only_is_no_foreign_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.bundle import open_bundle, write_bundle

    opened = open_bundle(make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle"), None)
    blobs: dict[str, Path | bytes] = {path.name: path for path in (tmp_path / "bundle" / "blobs").iterdir()}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(BundleError, match="Read-only file system") as caught:
        write_bundle(tmp_path / "out", opened.manifest, blobs, lambda data: b"")
    assert caught.value.hint


def test_signers_that_cannot_be_read_are_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle")
    signers = tmp_path / "allowed_signers"
    signers.write_text("")
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == signers:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert run_cli(["verify", str(bundle), "--signers", str(signers)]) == 2
    err = capsys.readouterr().err
    assert f"{signers} cannot be read: Permission denied" in err and f"next:  ls -l {signers}" in err


def test_signers_that_are_a_folder_are_a_refusal(tmp_path: Path) -> None:
    from device_agents.sshsig import SshKeygenChecker
    from device_agents.verify import Refused

    signature = (make_bundle(make_signer(tmp_path)).write(tmp_path / "bundle") / "manifest.json.sig").read_bytes()
    with pytest.raises(Refused, match="reading the signers"):
        SshKeygenChecker(tmp_path, tmp_path)(b"manifest", signature)
