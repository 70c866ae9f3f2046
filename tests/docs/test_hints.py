"""Every command that the code tells a person to type is one that ``edgevit`` has, with options that it takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from edgevit.cli import cli

ROOT = Path(__file__).resolve().parents[2]
VALUE = "VALUE"
"""Stands for what an f-string or ``format`` puts in."""

BEGINS = re.compile(r"(?<![\w./-])edgevit (?=[a-z-])")
"""A command, or a sentence about edgevit."""

ENDS = re.compile(r"\n|[;`'\"()|]|&&|[.,:](?:\s|$)|(?<![\w./-])edgevit ")
"""A command inside a text ends here; after a comma comes prose."""


@dataclass(frozen=True)
class Literal:
    """A string in the code; ``hint``: all of it is there to be typed."""

    line: int
    text: str
    hint: bool


def literals(node: ast.AST, hint: bool = False) -> Iterator[Literal]:
    """Every string literal below ``node``; what is put into one stands there as :data:`VALUE`."""
    for child in ast.iter_child_nodes(node):
        is_hint = hint or is_for_typing(child)
        if isinstance(child, ast.JoinedStr):
            parts = (str(v.value) if isinstance(v, ast.Constant) else VALUE for v in child.values)
            yield Literal(child.lineno, "".join(parts), is_hint)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield Literal(child.lineno, re.sub(r"\{\w*\}", VALUE, child.value), is_hint)
        else:
            yield from literals(child, is_hint)


def is_for_typing(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id in ("HINTS", "_HINTS") for t in node.targets)
    return isinstance(node, ast.keyword) and node.arg == "hint"


def commands_in(text: str) -> Iterator[list[str]]:
    """The words after ``edgevit`` of every command, and of every sentence, in ``text``."""
    for begin in BEGINS.finditer(text):
        rest = text[begin.end() :]
        end = ENDS.search(rest)
        yield rest[: end.start() if end else None].split()


def problem(words: list[str], hint: bool) -> str:
    """Why ``edgevit WORDS`` cannot be typed, or nothing. What names no command at all is prose, but not in a hint; there a
    command also has all of its arguments, or a … for them."""
    command: click.Command = cli
    given, left = [], iter(words)
    for word in left:
        if word.startswith("-"):
            option, _, value = word.partition("=")
            takes_value = options_of(cli) | options_of(command)
            if option not in takes_value:
                return f"{command.name} has no {option}"
            if takes_value[option] and not value:
                next(left, "")
        elif isinstance(command, click.Group) and word not in ("…", VALUE):
            below = command.get_command(click.Context(command), word)
            if below is None:
                return f"{command.name} has no command {word}" if hint or command is not cli else ""
            command = below
        else:
            given.append(word)
    needed = [param for param in command.params if isinstance(param, click.Argument) and param.required]
    if hint and len(given) < len(needed) and not {"…", "--help"} & set(words):
        return f"{command.name} needs {' '.join(param.metavar or param.human_readable_name for param in needed)}"
    return ""


def options_of(command: click.Command) -> dict[str, bool]:
    """Each option, and whether a value follows it."""
    found = {"--help": False, "-h": False}
    for param in command.params:
        if isinstance(param, click.Option):
            found.update(dict.fromkeys((*param.opts, *param.secondary_opts), not param.is_flag and not param.count))
    return found


@pytest.mark.parametrize("package", ["edgevit", "device_agents"])
def test_every_command_that_the_code_names_can_be_typed(package: str) -> None:
    found, wrong = 0, []
    for path in sorted((ROOT / package).rglob("*.py")):
        for literal in literals(ast.parse(path.read_text(encoding="utf-8"))):
            for words in commands_in(literal.text):
                found += 1
                why = problem(words, literal.hint)
                if why:
                    wrong.append(f"{path.relative_to(ROOT)}:{literal.line}: edgevit {' '.join(words)}: {why}")
    assert found, "no command was found at all"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ('fail(hint="edgevit target probe box; then edgevit depoly BUNDLE box")', "cli has no command depoly"),
        ('fail(hint=f"edgevit target {word} {name}, or edgevit target prove {name}")', "target has no command prove"),
        ('say("edgevit target add my-pi pi@host --provision && edgevit demo --traget my-pi")', "demo has no --traget"),
        ('say("edgevit results list --db FILE --fleet=F; edgevit demo -h")', ""),
        ('HINTS = {"x": "edgevit bensh BUNDLE {name}"}', "cli has no command bensh"),
        ('fail(hint="edgevit bench --plan quick BUNDLE, then look")', "bench needs BUNDLE TARGET..."),
        ('say("what edgevit has: edgevit build … --for {name}. Where edgevit is, see edgevit doctor.")', ""),
    ],
)
def test_a_wrong_command_is_found(code: str, wrong: str) -> None:
    problems = [problem(words, one.hint) for one in literals(ast.parse(code)) for words in commands_in(one.text)]
    assert [p for p in problems if p] == ([wrong] if wrong else [])
