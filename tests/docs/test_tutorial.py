"""The tutorial's commands, run in order as a person would; and the documents hold to the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click

from edgevit.cli import cli

ROOT = Path(__file__).resolve().parents[2]


def console_commands(text: str) -> list[str]:
    """The lines after ``$`` in every ```console block."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_every_command_of_the_tutorial_works_in_order(tmp_path: Path, home: Path) -> None:
    commands = console_commands((ROOT / "docs/tutorial.md").read_text(encoding="utf-8"))
    assert len(commands) >= 20
    said: dict[str, str] = {}
    for command in commands:
        words = shlex.split(command)
        if words[0] == "python":
            # One pass over the data teaches enough to be shipped and timed; the tutorial's reader trains all ten.
            argv = [sys.executable, *words[1:], "--epochs", "1"]
        else:
            assert words[0] == "edgevit", command
            argv = [sys.executable, "-m", "edgevit", *words[1:]]
        done = subprocess.run(
            argv, cwd=tmp_path, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL, env={**os.environ}
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said.setdefault(command, done.stdout)
    second_deploy = said["edgevit deploy bundles/int8-dynamic local"]
    assert "onnx-int8-dynamic" in second_deploy
    table = next(out for command, out in said.items() if command.startswith("edgevit run"))
    for artifact in ("onnx-fp32", "tflite-fp32", "onnx-int8", "tflite-int8"):
        assert artifact in table
    assert max(len(line) for line in table.splitlines()) <= 100
    assert (tmp_path / "report.html").stat().st_size > 100_000


def commands(group: click.Group, path: str, parent: click.Context | None = None) -> list[tuple[str, click.Command]]:
    ctx = click.Context(group, info_name=path, parent=parent)
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += commands(command, f"{path} {name}", ctx)
    return found


def test_every_command_and_option_is_documented_and_has_help() -> None:
    reference = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    for path, command in commands(cli, "edgevit"):
        assert f"## `{path}`" in reference, path
        assert command.help, f"{path} has no help"
        for option in command.params:
            if isinstance(option, click.Option):
                assert max(option.opts, key=len) in reference, f"{path} {option.opts}"


def test_commands_named_in_documents_and_hints_exist() -> None:
    known = {path for path, _ in commands(cli, "edgevit")}
    texts = [
        *(ROOT / "docs").glob("*.md"),
        ROOT / "README.md",
        *(ROOT / "edgevit").rglob("*.py"),
        *(ROOT / "device_agents").rglob("*.py"),
    ]
    for path in texts:
        for mentioned in re.findall(r'(?:`|hint=f?")edgevit ([a-z]+(?: [a-z]+)?)', path.read_text(encoding="utf-8")):
            first, *rest = mentioned.split()
            assert f"edgevit {first}" in known, f"{path.name} names `edgevit {mentioned}`"
            group = next(c for p, c in commands(cli, "edgevit") if p == f"edgevit {first}")
            if rest and isinstance(group, click.Group):
                assert f"edgevit {first} {rest[0]}" in known, f"{path.name} names `edgevit {mentioned}`"
