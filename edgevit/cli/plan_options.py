"""The options that say how variants are measured, shared by ``bench`` and ``run``: together they make one plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgevit.cli.console import FloatRange
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from device_agents.wire import RunPlan

F = TypeVar("F", bound=Callable[..., Any])

COOL_SECONDS = 300.0

_OPTIONS = (
    click.option(
        "--plan",
        "plan_name",
        type=click.Choice(["quick", "standard", "sustained", "compare"]),
        help="How long and how: docs/measuring.md. Default: standard; compare with --against.",
    ),
    click.option(
        "--minutes",
        type=FloatRange(0, 24 * 60, min_open=True),
        metavar="M",
        help="How long a sustained plan lasts.  [default: 10]",
    ),
    click.option(
        "--affinity", metavar="CPUS", help="Keep to these CPUs of the device, such as 0-3 or 0,2; default: all it may use."
    ),
    click.option(
        "--cool-to", type=FloatRange(-40, 150), metavar="C", help="Before each series, wait until the board is this cool."
    ),
    click.option(
        "--cool-within",
        type=FloatRange(0, 100),
        metavar="K",
        help="The same, as degrees above what it had when the job began.",
    ),
    click.option(
        "--cool-seconds",
        type=FloatRange(0, 7200),
        default=COOL_SECONDS,
        show_default=True,
        metavar="S",
        help="Wait no longer than this each time.",
    ),
    click.option(
        "--tune-system",
        is_flag=True,
        help="Set the performance governor while measuring, and put back what was there. Needs the right to.",
    ),
    click.option("--profile-ops", is_flag=True, help="Also the time of each operator, by the runtime's own profiler."),
)


def plan_options(command: F) -> F:
    """Options → the command's ``plan``, a RunPlan; a command with an ``against`` gets the comparing one where that is given."""

    @functools.wraps(command)
    def with_plan(*args: Any, **options: Any) -> Any:
        names = ("plan_name", "minutes", "affinity", "cool_to", "cool_within", "cool_seconds", "tune_system", "profile_ops")
        given = {name: options.pop(name) for name in names}
        comparing = options.get("against") is not None
        options["plan"] = choose_plan(comparing=comparing, **given)
        return command(*args, **options)

    wrapped: Any = with_plan
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def choose_plan(
    *,
    plan_name: str | None,
    comparing: bool,
    minutes: float | None,
    affinity: str | None,
    cool_to: float | None,
    cool_within: float | None,
    cool_seconds: float,
    tune_system: bool,
    profile_ops: bool,
) -> RunPlan:
    """One plan of what was asked for. UsageError where two of it exclude each other."""
    from edgevit.plans import PLANS, parse_cpus, with_minutes

    if comparing and plan_name not in (None, "compare"):
        raise UsageError(f"--against measures by the plan compare, got --plan {plan_name}", hint="leave --plan out")
    if plan_name == "compare" and not comparing:
        raise UsageError("--plan compare needs a second bundle", hint="edgevit bench A --against B TARGET")
    if cool_to is not None and cool_within is not None:
        raise UsageError("--cool-to and --cool-within exclude each other", hint="leave one of them out")
    if cool_seconds != COOL_SECONDS and cool_to is None and cool_within is None:
        raise UsageError(
            "--cool-seconds bounds the wait for a temperature, and none is waited for",
            hint="edgevit bench BUNDLE TARGET --cool-within 5",
        )
    plan = PLANS["compare" if comparing else plan_name or "standard"]
    if minutes is not None:
        plan = with_minutes(plan, minutes)
    return dataclasses.replace(
        plan,
        affinity=parse_cpus(affinity) if affinity else (),
        cool_to_c=cool_to,
        cool_within_c=cool_within,
        cool_seconds=cool_seconds,
        tune_system=tune_system,
        profile_ops=profile_ops,
    )
