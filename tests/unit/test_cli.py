"""The command line: what it loads, what it answers, and its exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from edgevit import errors
from edgevit.cli import COMMANDS, cli, exit_code, run_cli
from edgevit.fleet.inventory import Target, add_target
from edgevit.places import fleet_path

HEAVY = ("torch", "onnxruntime", "paramiko", "sqlalchemy", "timm", "onnx", "numpy")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argv", [["--help"], ["profiles"], ["profiles", "show", "raspberry-pi-5"], ["key", "--help"], ["build", "--help"]]
)
def test_light_commands_load_no_heavy_module(argv: list[str]) -> None:
    code = (
        "import sys\nfrom edgevit.cli import run_cli\n"
        f"status = run_cli({argv!r})\n"
        f"print('loaded:', sorted(m for m in {HEAVY!r} if m in sys.modules), status, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1] == "loaded: [] 0"


def test_the_listed_help_is_each_commands_own() -> None:
    ctx = click.Context(cli)
    for name, (_, _, line) in COMMANDS.items():
        command = cli.get_command(ctx, name)
        assert command is not None, name
        own = (command.help or "").strip().splitlines()[0]
        assert own.rstrip(".").split(",")[0].split(":")[0], name
        assert line.endswith("."), name


def test_generated_command_reference_is_in_step() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/cli_docs.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_doctor_names_what_every_extra_brings() -> None:
    from edgevit.cli.doctor import PARTS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(PARTS) == set(extras) - {"all", "test"}, "what is missing of the others is not told"
    for extra, parts in PARTS.items():
        brought = {requirement.split(">")[0].split("[")[0] for requirement in extras[extra]}
        assert {name for name, _ in parts} <= brought, f"pip install edgevit[{extra}] would not bring it"


def _subclasses(cls: type) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _subclasses(sub))]


def test_every_error_has_one_exit_code() -> None:
    wanted = {errors.UsageError: 2, errors.DeviceError: 3}
    for cls in _subclasses(errors.EdgevitError):
        if cls.__module__ != "edgevit.errors":
            continue
        error = cls.__new__(cls)
        expected = next((code for base, code in wanted.items() if issubclass(cls, base)), 1)
        assert exit_code(error) == expected, cls.__name__


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    for cls in _subclasses(errors.EdgevitError):
        if cls.__module__ == "edgevit.errors":
            assert cls.__name__ in drawn, f"{cls.__name__} is missing from the docstring of edgevit.errors"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["biuld"], "did you mean build"),
        (["profiles", "show", "raspberry-pi-6"], "did you mean raspberry-pi-5"),
        (["recipes", "show", "int8-dinamic"], "did you mean int8-dynamic"),
        (["deploy", "/nonexistent", "local"], "/nonexistent"),
        (["target", "add", "local", "pi@127.0.0.1", "--port", "1"], "local is this very machine and always exists"),
        (["bench", "/nonexistent"], "TARGET"),
        (["build", "deit_tiny_patch16_224", "--random-weights", "--recipe", "fp32", "-o", "x"], "--profile P or --for TARGET"),
        (["target", "probe", "nobody"], "nobody"),
        (["target", "daemon", "install", "local", "--unit", "user", "--as", "x"], "runs as the SSH user"),
        (["target", "provision", "local", "--wheelhouse", ".", "--upgrade"], "asks none"),
        (["results", "show"], "nothing has been measured yet"),
        (["report", "-o", "x.html"], "nothing has been measured yet"),
        (["verify", "."], "signing key"),
        (["bench", "b", "local", "--max-loss", "0.2"], "no policy chooses here"),
        (["bench", "b", "local", "--cool-seconds", "60"], "none is waited for"),
        (["deploy", "b", "local", "--max-loss", "0.2"], "no policy chooses here"),
        (["deploy", "b", "local", "--select", "onnx-fp32", "--anyway"], "no policy chooses here"),
        (["run", "m", "--random-weights", "--recipe", "fp32", "--target", "local", "--anyway"], "no policy chooses here"),
        (["report", "-o", "x.html", "--port", "9000"], "where the page is served"),
        (["fleet", "check", "local", "--timeout", "nan"], "'nan' is no number"),
        (["deploy", "b", "local", "--wave", "1", "--max-p90-growth", "nan"], "'nan' is no number"),
        (["deploy", "b", "local", "--max-rate", "nan"], "'nan' is no number"),
        (["target", "list", "--fleet"], "'--fleet' requires an argument"),
        (["--fleet", " ", "target", "list"], "--fleet is empty"),
        (["results", "list", "--db", "mysql://host/db"], "neither SQLite nor PostgreSQL"),
        (["results", "list", "--db", "nosuch://host/db"], "nosuch"),
    ],
)
def test_wrong_use_says_what_to_do(argv: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["explain", "{}"],
        ["build", "vit_tiny_patch16_224", "--recipe", "fp32", "--profile", "generic-arm64", "-o", "out", "--weights", "{}"],
        ["build", "vit_tiny_patch16_224", "--recipe", "fp32", "--profile", "generic-arm64", "-o", "{}", "--random-weights"],
    ],
    ids=["bundle", "weights", "output"],
)
def test_a_path_that_the_system_will_not_look_at_is_named(argv: list[str], home: Path, tmp_path: Path, capsys: Any) -> None:
    """A name that is too long, as a folder of somebody else's: no traceback."""
    path = tmp_path / ("n" * 300)
    assert run_cli([word.format(path) for word in argv]) == 2
    said = capsys.readouterr().err
    assert f"error: {path}" in said and "File name too long" in said and f"next:  ls -ld {tmp_path}" in said


def test_json_is_one_document_on_standard_output(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, schema in (
        (["profiles"], "profiles"),
        (["recipes"], "recipes"),
        (["target", "list"], "targets"),
        (["doctor"], "doctor"),
    ):
        assert run_cli([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["schema"] == f"edgevit.{schema}/1"


@pytest.fixture
def off(home: Path) -> tuple[str, str]:
    """Two targets where nobody listens."""
    for name in ("off-1", "off-2"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            add_target(fleet_path(), Target(name=name, host="127.0.0.1", port=s.getsockname()[1]))
    return "off-1", "off-2"


def test_devices_that_were_not_rolled_back_stand_in_the_document(
    off: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["rollback", *off, "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)["targets"]
    assert [(row["target"], row["outcome"]) for row in rows] == [(name, "unreachable") for name in off]
    assert all(row["error"]["kind"] == "Unreachable" for row in rows)


@pytest.mark.parametrize(
    "command",
    ["target probe", "target provision --dry-run", "target prune", "target daemon status", "target daemon logs"],
)
def test_devices_that_are_off_stand_in_the_document(
    off: tuple[str, str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run_cli([*command.split(), *off, "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["targets"] == []
    assert [(row["target"], row["error"]["kind"]) for row in document["failed"]] == [(name, "Unreachable") for name in off]


def test_a_target_that_cannot_be_trusted_anew_does_not_keep_the_next_from_it(
    off: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["target", "trust", "local", *off]) == 3
    said = capsys.readouterr().err
    assert all(f"error: {name}: " in said for name in off)
    assert "local: is this machine" in said


def test_a_run_to_cancel_may_be_on_a_device_that_is_off(off: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run = "20260131-120000-0123abcd"
    assert run_cli(["collect", "off-1", "--cancel", run]) == 3, "whether it is there cannot be told"
    assert f"no run {run} is queued or running on off-1, as far as they were reached" in capsys.readouterr().err


def test_the_fleet_file_is_named_anywhere_on_the_line_for_that_line_alone(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = tmp_path / "rack.yaml"
    fleet.write_text("schema: edgevit.fleet/1\ntargets:\n  box:\n    host: 10.0.0.1\n")
    for argv in (["--fleet", str(fleet), "target", "list"], ["target", "list", f"--fleet={fleet}"]):
        assert run_cli(argv) == 0
        assert "box" in capsys.readouterr().out, argv
    assert run_cli(["target", "list"]) == 0
    assert "box" not in capsys.readouterr().out
    assert run_cli(["target", "list", "--fleet", str(tmp_path / "rakc.yaml")]) == 0
    assert f"there is no file {tmp_path / 'rakc.yaml'}" in capsys.readouterr().err


def test_a_key_that_is_none_is_refused_before_anything_is_built(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("no key at all")
    asked = ["build", "edgevit.digits:digits_vit", "--random-weights", "--recipe", "fp32", "--profile", "generic-x86-64"]
    assert run_cli([*asked, "--sign-key", str(key), "-o", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert f"reading the public half of {key}" in said and "exporting" not in said


def test_behind_two_dashes_stand_no_options_of_the_program(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["recipes", "show", "--", "--fleet"]) == 2
    assert "no recipe named '--fleet'" in capsys.readouterr().err
