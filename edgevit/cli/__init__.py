"""The command line. Commands are loaded when they are called, so that ``edgevit --help`` costs next to nothing.

Errors become exit codes here and nowhere else: 0 done, 1 the work failed, 2 wrong use or configuration, 3 a device was
unreachable or refused.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from edgevit.errors import DeviceError, EdgevitError, UsageError

# name → (module, attribute, one line of help). The line stands here so that listing commands imports none of them; a
# test holds each against the command's own help.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("edgevit.cli.demo", "demo", "The whole path on handwritten digits, without a network."),
    "doctor": (
        "edgevit.cli.doctor",
        "doctor",
        "Where everything is kept, what is installed, what is missing and how to get it.",
    ),
    "profiles": ("edgevit.cli.profiles", "profiles", "The kinds of boards edgevit knows, and what is known of each."),
    "recipes": ("edgevit.cli.recipes", "recipes", "The shipped compression recipes."),
    "key": ("edgevit.cli.key", "key", "The SSH key that signs bundles, and who may sign for a target."),
    "target": ("edgevit.cli.target", "target", "The boxes edgevit ships to."),
    "fleet": ("edgevit.cli.fleet", "fleet", "All targets at once: are they well, what runs on them, what was done to them."),
    "build": ("edgevit.cli.build", "build", "Compress and export a model into signed bundles."),
    "verify": ("edgevit.cli.bundle", "verify", "Check a bundle's signature and every byte of it."),
    "explain": ("edgevit.cli.bundle", "explain", "What is in a bundle, and what was done to the model."),
    "deploy": ("edgevit.cli.deploy", "deploy", "Ship a bundle to targets and activate it there."),
    "rollback": ("edgevit.cli.deploy", "rollback", "Activate what was active before."),
    "bench": ("edgevit.cli.bench", "bench", "Measure a bundle on targets; nothing there is activated."),
    "collect": ("edgevit.cli.collect", "collect", "Send what waits for devices that were off, bring results home."),
    "predict": ("edgevit.cli.predict", "predict", "Run images through a bundle on a target."),
    "run": ("edgevit.cli.run", "run", "Build, deploy, bench, and show the table."),
    "study": ("edgevit.cli.study", "study", "A grid of recipes, models and targets, built, measured and compared."),
    "tune": ("edgevit.cli.tune", "tune", "Search for the recipe that is fastest on each target within limits."),
    "coverage": ("edgevit.cli.coverage", "coverage", "Which of timm's families can be exported, and why not the rest."),
    "results": ("edgevit.cli.results", "results", "What has been measured."),
    "report": ("edgevit.cli.report", "report", "One self-contained page of results that works offline."),
}

CLOSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Why a path that a person named cannot even be asked about, whatever command is given it."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{attribute} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The group's own options may stand anywhere on the line, up to ``--``."""
        own = {name for param in self.params if param.expose_value for name in param.opts}
        moved: list[str] = []
        rest: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                rest += [word, *words]
            elif word in own:
                value = next(words, None)
                if value is None:
                    raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
                moved += [word, value]
            elif word.partition("=")[0] in own:
                moved.append(word)
            else:
                rest.append(word)
        return super().parse_args(ctx, [*moved, *rest])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from edgevit.errors import UnknownName

            raise UnknownName("command", args[0], COMMANDS, hint="edgevit --help")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edgevit", prog_name="edgevit")
@click.option("--db", metavar="URL", help="The results store: a file, or postgresql+psycopg://… (default: EDGEVIT_DB).")
@click.option("--fleet", metavar="FILE", help="The fleet file (default: EDGEVIT_FLEET).")
@click.pass_context
def cli(context: click.Context, db: str | None, fleet: str | None) -> None:
    """Make Vision Transformers small and fast, ship them to boards over SSH, measure them there.

    First steps: `edgevit demo`, then `edgevit target add NAME USER@HOST` and
    `edgevit run MODEL --weights FILE --recipe fp32 --recipe int8-dynamic --target NAME`.

    `--db` and `--fleet` may stand anywhere on the line.
    """
    from edgevit.places import fleet_path, using

    for option, variable, value in (("--db", "EDGEVIT_DB", db), ("--fleet", "EDGEVIT_FLEET", fleet)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty", hint="edgevit doctor")
        if value is not None:
            context.with_resource(using(variable, value))
    if fleet is not None and not fleet_path().exists():
        # Not refused: `target add` makes it. But a name mistyped looks like a fleet of nobody.
        from edgevit.cli.console import say

        say(f"--fleet: there is no file {fleet_path()}; local is the only target until edgevit target add makes it")


def exit_code(error: EdgevitError) -> int:
    """The one table from errors to exit codes."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, DeviceError):
        return 3
    return 1


def exit_code_of(errors: Iterable[EdgevitError]) -> int:
    """Of several that came together: the highest; 0 for none."""
    return max(map(exit_code, errors), default=0)


def show_error(error: EdgevitError) -> None:
    """The message and the next command to type, on standard error."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
    if error.hint:
        click.echo(f"{click.style('next:', fg='cyan')}  {error.hint}", err=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run_cli(argv))


def run_cli(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Separate from :func:`main` so that tests and the demo can call it."""
    try:
        result: Any = cli.main(args=None if argv is None else list(argv), prog_name="edgevit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except EdgevitError as error:
        show_error(error)
        return exit_code(error)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return 2
    except BrokenPipeError:
        # The reader of our output went away (`edgevit … | head`): not an error of the work.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in CLOSED or not isinstance(error.filename, str):
            raise
        closed = UsageError(f"{error.filename} cannot be looked at: {error.strerror}", hint=f"ls -ld {_parent(error.filename)}")
        show_error(closed)
        return exit_code(closed)


def _parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] or ("/" if path.startswith("/") else ".")
