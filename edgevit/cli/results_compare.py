"""``edgevit results compare`` and ``edgevit results history``: stored figures against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgevit.cli.console import emit_json, json_option, out
from edgevit.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from edgevit.results.sides import Paired, Side
    from edgevit.results.store import Store


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--target", help="What was measured on this target alone.")
@click.option("--anyway", is_flag=True, help="Show also what does not compare, labelled so.")
@json_option
def compare(a: str, b: str, target: str | None, anyway: bool, as_json: bool) -> int:
    """A against B: the ratio of latencies with its interval, accuracy on the same images, memory, size, energy.

    A and B are a batch or a run each, with :ARTIFACT[:RUNTIME[:PROVIDER[:THREADS]]] for one variant of it. What was measured
    under other conditions (board, runtime and its version, threads, CPUs, plan, governor, power mode, clocks, images)
    is refused, naming each that differs with both values; so is what is INVALID. Exit 1 where a pair has no ratio.
    """
    from edgevit.report.compare_view import json_paired, labels, render_paired
    from edgevit.results.sides import pair_sides
    from edgevit.results.store import open_store

    with open_store() as store:
        paired = pair_sides(_side(store, a, target), _side(store, b, target))
    found = [f"{pair.a.run.job.target}, {pair.a.variant.artifact}: {label}" for pair in paired.pairs for label in labels(pair)]
    if found and not anyway:
        raise UsageError(
            "A and B do not compare:\n  " + "\n  ".join(dict.fromkeys(found)),
            hint=f"measure both under the same conditions, or: edgevit results compare {a} {b} --anyway",
        )
    if as_json:
        emit_json("compare", json_paired(paired))
    else:
        out().print(render_paired(paired))
    return _exit_code(paired)


def _exit_code(paired: Paired) -> int:
    return int(any(pair.latency is None for pair in paired.pairs))


def _side(store: Store, wanted: str, target: str | None) -> list[Side]:
    from edgevit.results.sides import pick_side

    name, _, variant = wanted.partition(":")
    runs = store.runs(name) or store.runs(run_id=name)
    if not runs:
        raise UnknownName("batch or run", name, [batch.id for batch in store.batches()], hint="edgevit results list")
    found = pick_side(runs, variant, target)
    if not found:
        there = dict.fromkeys(f"{m.variant.artifact} on {run.job.target}" for run in runs for m in run.measurements)
        what = f"{variant or 'anything'}{f' on {target}' if target else ''}"
        raise UsageError(
            f"{name} holds no measurement of {what}; it holds {', '.join(there) or 'none at all'}",
            hint=f"edgevit results show {name}",
        )
    return found


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("target")
@click.option("--anyway", is_flag=True, help="Let INVALID figures count.")
@json_option
def history(name: str, target: str, anyway: bool, as_json: bool) -> None:
    """The p50 of the bundle NAME on TARGET over its versions, and the versions from which on it was another.

    NAME is the bundle's name, without its version. A step is told from chance by permuting runs, so measure each version more
    than once, on other days; what else changed at that step (runtime, governor, clock …) is named.
    """
    from edgevit.report.compare_view import json_history, render_history
    from edgevit.results.history import trace_history
    from edgevit.results.store import open_store

    with open_store() as store:
        runs = store.runs(target=target, bundle_name=name)
        if not runs:
            outlines = store.outlines()
            there = sorted({f"{bundle} {run.target}" for run in outlines for bundle in run.bundle_names})
            raise UnknownName("bundle and target", f"{name} {target}", there, hint="edgevit bench BUNDLE TARGET")
    found = trace_history(runs, name, target, anyway=anyway)
    if as_json:
        emit_json("history", {"bundle_name": name, "target": target, "variants": json_history(found)})
    else:
        out().print(render_history(name, target, found))
