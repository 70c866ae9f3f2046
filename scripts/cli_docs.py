"""Write docs/cli.md from the commands' own help; ``--check`` fails where the file lags behind."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgevit.cli import cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# The commands

Generated from the commands' own help by `python scripts/cli_docs.py`; a test holds it in step.

Exit codes: 0 done; 1 the work failed (parity, a failed measurement such as a golden
mismatch; with `--require-valid` also an INVALID run); 2 wrong use or
configuration; 3 a device was unreachable or refused. Over several devices: 3 if any, else the worst other.

Environment: `EDGEVIT_HOME` (everything below one folder), `EDGEVIT_DB` (results), `EDGEVIT_FLEET` (fleet file);
`--db` and `--fleet`, anywhere on the line, stand above them.
`edgevit doctor` prints where everything is.
"""


def sections(command: click.Command, path: str, parent: click.Context | None) -> list[str]:
    """One section a command, depth first."""
    ctx = click.Context(command, info_name=path.split()[-1], parent=parent, max_content_width=100, terminal_width=100)
    out = [f"\n## `{path}`\n\n```\n{command.get_help(ctx).strip()}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            sub = command.get_command(ctx, name)
            if sub is None:
                raise SystemExit(f"{path} {name} is listed and cannot be loaded")
            out += sections(sub, f"{path} {name}", ctx)
    return out


def text() -> str:
    return HEAD + "".join(sections(cli, "edgevit", None))


if __name__ == "__main__":
    wanted = text()
    if "--check" in sys.argv:
        if TARGET.read_text(encoding="utf-8") != wanted:
            sys.exit("docs/cli.md lags behind the commands; type: python scripts/cli_docs.py")
    else:
        TARGET.write_text(wanted, encoding="utf-8")
        print(f"wrote {TARGET}")
