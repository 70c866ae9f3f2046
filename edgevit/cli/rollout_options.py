"""The options of a roll-out: together they make one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from edgevit.cli.console import FloatRange
from edgevit.errors import UsageError
from edgevit.fleet.gates import GATES, Limits
from edgevit.fleet.rollout import Share, parse_share

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT = Limits()


@dataclass(frozen=True)
class Rollout:
    """Waves, what each must hold, when to ask and when to stop. ``blocks``: ABBA blocks of each comparison."""

    waves: tuple[Share, ...]
    limits: Limits
    max_failed: Share
    pause: bool
    blocks: int


_OPTIONS = (
    click.option(
        "--wave",
        "waves",
        multiple=True,
        metavar="N|P%",
        help="Roll out in waves, counted from the beginning: --wave 1 --wave 25% --wave 100%.",
    ),
    click.option(
        "--max-p90-growth",
        type=FloatRange(0, 1e6),
        metavar="P",
        help=f"Of a wave: by how many percent p90 may be worse than before.  [default: {DEFAULT.p90_growth:g}]",
    ),
    click.option(
        "--max-memory-growth",
        type=FloatRange(0, 1e6),
        metavar="P",
        help=f"The same of the peak of memory.  [default: {DEFAULT.memory_growth:g}]",
    ),
    click.option(
        "--max-top1-loss",
        type=FloatRange(0, 100),
        metavar="POINTS",
        help=f"By how many points top-1 may be lower than before.  [default: {DEFAULT.top1_loss:g}]",
    ),
    click.option(
        "--without-gate",
        multiple=True,
        type=click.Choice(GATES),
        help="Do without this gate, where it cannot be judged or does not matter; repeat for several.",
    ),
    click.option(
        "--max-failed",
        metavar="N|P%",
        help="Devices tried so far that may be unreachable or refuse before the roll-out stops.  [default: 0]",
    ),
    click.option("--gate-blocks", type=click.IntRange(3, 50), metavar="N", help="ABBA blocks of a comparison.  [default: 8]"),
    click.option("--pause", is_flag=True, help="Ask before each wave but the first."),
)


def rollout_options(command: F) -> F:
    """Options → the command's ``rollout``, None without --wave. UsageError for an option of waves without one."""

    @functools.wraps(command)
    def with_rollout(*args: Any, **options: Any) -> Any:
        names = (
            "waves", "max_p90_growth", "max_memory_growth", "max_top1_loss", "without_gate", "max_failed", "gate_blocks",
            "pause",
        )  # fmt: skip
        given = {name: options.pop(name) for name in names}
        return command(*args, **options, rollout=make_rollout(**given))

    wrapped: Any = with_rollout
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def make_rollout(
    *,
    waves: tuple[str, ...],
    max_p90_growth: float | None,
    max_memory_growth: float | None,
    max_top1_loss: float | None,
    without_gate: tuple[str, ...],
    max_failed: str | None,
    gate_blocks: int | None,
    pause: bool,
) -> Rollout | None:
    """What was asked for, defaults filled in."""
    if not waves:
        given = {
            "--max-p90-growth": max_p90_growth is not None,
            "--max-memory-growth": max_memory_growth is not None,
            "--max-top1-loss": max_top1_loss is not None,
            "--without-gate": bool(without_gate),
            "--max-failed": max_failed is not None,
            "--gate-blocks": gate_blocks is not None,
            "--pause": pause,
        }
        if alone := [name for name, there in given.items() if there]:
            raise UsageError(f"{alone[0]} is for a roll-out in waves", hint=f"--wave 1 --wave 100% {alone[0]} …")
        return None
    limits = Limits(
        DEFAULT.p90_growth if max_p90_growth is None else max_p90_growth,
        DEFAULT.memory_growth if max_memory_growth is None else max_memory_growth,
        DEFAULT.top1_loss if max_top1_loss is None else max_top1_loss,
        tuple(sorted(set(without_gate))),
    )
    return Rollout(
        waves=tuple(parse_share(text, "--wave") for text in waves),
        limits=limits,
        max_failed=parse_share(max_failed or "0", "--max-failed"),
        pause=pause,
        blocks=gate_blocks or 8,
    )
