"""``edgevit demo``: the whole path on handwritten digits."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext

import click


@click.command()
@click.option("--target", "own_target", metavar="T", help="A target of yours instead of this machine.")
def demo(own_target: str | None) -> int:
    """The whole path on handwritten digits, without a network: train, build, sign, ship, measure, report.

    Runs on this machine: once through the `local` agent and, where an sshd is installed, once more over real SSH.
    """
    from edgevit import demo as steps
    from edgevit.cli.connect import each_target
    from edgevit.cli.progress_context import showing_progress
    from edgevit.cli.results import summarize_runs
    from edgevit.cli.run import require_a_runtime
    from edgevit.places import data_dir
    from edgevit.results.store import open_store

    began = time.monotonic()
    targets = ["local"]
    if own_target:
        # A minute of training is not begun for a device that is not there.
        ready, unready = each_target([own_target], require_a_runtime)
        if unready:
            return unready
        targets = [name for name, _ in ready]
    folder = data_dir() / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # A person's own target is known to their own fleet file, and trusts their own key.
        stack.enter_context(nullcontext() if own_target else steps.home(folder))
        with showing_progress() as progress:
            progress.start("data", "handwritten digits (scikit-learn's own)")
            bundles = steps.build_digits(folder, progress, targets)
        steps.call("verify", bundles[1])
        steps.show_refusal(bundles[1], folder)
        if not own_target:
            loopback = steps.add_loopback(folder, stack)
            targets += [loopback] if loopback else []
        steps.call("deploy", bundles[1], *targets)
        from edgevit.bundle import open_bundle
        from edgevit.cli.bench import Wanted, bench_bundles
        from edgevit.plans import PLANS
        from edgevit.select import Gates

        click.echo(f"\nmeasuring both bundles on {' and '.join(targets)}, plan quick, one thread", err=True)
        wanted = Wanted([open_bundle(b, None) for b in bundles], PLANS["quick"], threads=(1,))
        code = bench_bundles(wanted, targets, Gates())
        if code:
            return code
        with open_store() as store:
            summaries = summarize_runs(store.runs(batch_id=store.batches()[0].id))
        page = folder / "report.html"
        steps.call("report", "-o", page)
    best = steps.best_of(summaries)
    click.echo(f"\ndone in {time.monotonic() - began:.0f} s")
    if best is None:
        why = "no artifact stayed within one point of fp32"
        if not any(s.rankable for s in summaries):
            why = "every measurement is INVALID, for the reasons above: leave this machine alone and try again"
        click.echo(f"best: none: {why}")
    else:
        figures = f"{best.speedup:.2f} × fp32, {best.file_mb:.2f} MB, {best.points:+.1f} points top-1"
        click.echo(f"best: {best.artifact} on {best.target}: {figures}")
    click.echo(f"report: {page}")
    click.echo("with a Pi: edgevit target add my-pi pi@raspberrypi.local --provision && edgevit demo --target my-pi")
    return 0
