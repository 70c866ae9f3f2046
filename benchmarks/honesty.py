"""Is a figure of ``bench`` what a person would measure by hand, and is it the same the next time?

1. p50 of the agent beside a bare loop over the same file, runtime, threads and samples: fresh processes on both sides, with as
   many processes and as much warm-up, alternating A B A B …; the ratio of the medians over rounds. Goal: within 2 %.
2. ``standard``, repeated: the standard deviation of its p50 over the repetitions, that of a bare loop beside each (that much is
   the machine's own), and how many of the intervals that are shown with it hold the median of all.

What falsified a round (another load on the machine) is named, and the round is left out of 2, kept in 1: there both sides
had it. Give a bundle directory to use another model than the digits'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from device_agents import wire
from device_agents.pixels import prepare
from device_agents.verdict import judge
from edgevit.bench import make_job
from edgevit.bundle import Bundle, open_bundle
from edgevit.cli.connect import Session, open_session
from edgevit.fleet.inventory import local_target
from edgevit.plans import PLANS
from edgevit.results.stats import summarize
from edgevit.variants import list_variants

BARE = """
import json, sys, time
import numpy as np
path, runtime = sys.argv[1:3]
threads, warmup, samples = (int(v) for v in sys.argv[3:6])
x = np.load(sys.argv[6])
if runtime == "onnxruntime":
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    def call():
        return session.run(None, feed)
else:
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    i, o = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    def call():
        interpreter.set_tensor(i, x)
        interpreter.invoke()
        return interpreter.get_tensor(o)
begin = time.perf_counter()
done = 0
while done < warmup or time.perf_counter() - begin < float(sys.argv[7]):
    call()
    done += 1
times = []
for _ in range(samples):
    t = time.perf_counter_ns()
    call()
    times.append(time.perf_counter_ns() - t)
print(json.dumps(times))
"""


def bare(bundle: Bundle, artifact: wire.Artifact, variant: wire.Variant, plan: wire.RunPlan, folder: Path) -> list[int]:
    """One fresh process with nothing in it but the loop; nanoseconds."""
    pixels = np.load(bundle.blob_path(bundle.manifest.golden.blob.sha256))[: artifact.batch]
    np.save(folder / "x.npy", prepare(pixels, bundle.manifest.preprocessing, artifact.input))
    model = folder / f"model.{artifact.format}"
    if not model.exists():
        model.write_bytes(bundle.blob_path(artifact.blob.sha256).read_bytes())
    argv = [str(model), variant.runtime, str(variant.threads), str(plan.warmup_iterations), str(plan.min_samples)]
    argv += [str(folder / "x.npy"), str(plan.warmup_seconds)]
    done = subprocess.run([sys.executable, "-c", BARE, *argv], capture_output=True, text=True, check=True)
    times: list[int] = json.loads(done.stdout)
    return times


def build_digits(out: Path) -> Path:
    """The digits model with random weights: what it answers does not matter here."""
    from edgevit.cli import run_cli

    argv = [
        "build",
        "edgevit.digits:digits_vit",
        "--random-weights",
        "--recipe",
        "int8-dynamic",
        "--for",
        "local",
        "-o",
        str(out),
    ]
    if run_cli(argv) != 0:
        raise SystemExit("the bundle could not be built")
    return out


def agent_run(session: Session, plan: wire.RunPlan, variant: wire.Variant) -> wire.Run:
    """One job, measured and acknowledged."""
    job = make_job("local", "benchmark", plan, [variant])
    session.agent.submit(job)
    run = session.agent.follow(job.run_id)
    session.agent.ack(job.run_id)
    return run


def compare_with_bare(
    session: Session, bundle: Bundle, artifact: wire.Artifact, variant: wire.Variant, folder: Path, rounds: int, samples: int
) -> None:
    """Part 1, one line."""
    plan = dataclasses.replace(PLANS["standard"], processes=1, min_samples=samples, min_seconds=0.0, accuracy=False)
    ratios, ours, theirs, falsified = [], [], [], 0
    for number in range(rounds):
        # Who goes first changes from round to round, so that what the first leaves in the caches is nobody's advantage.
        other = bare(bundle, artifact, variant, plan, folder) if number % 2 else []
        run = agent_run(session, plan, variant)
        other = other or bare(bundle, artifact, variant, plan, folder)
        falsified += not judge(run, run.measurements[0]).valid
        ours.append(statistics.median(run.measurements[0].series[0].samples_ns))
        theirs.append(statistics.median(other))
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"{variant.artifact:22s} {variant.runtime:12s} agent p50 {statistics.median(ours) / 1e6:.3f} ms   "
        f"bare p50 {statistics.median(theirs) / 1e6:.3f} ms   ratio {statistics.median(ratios):.4f} "
        f"(per round {min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds, {falsified} INVALID)",
        flush=True,
    )


def repeat_standard(
    session: Session, bundle: Bundle, artifact: wire.Artifact, variant: wire.Variant, folder: Path, repeats: int
) -> None:
    """Part 2, one line and what falsified any. The bare loop goes beside each, so that the machine's own share is seen."""
    plan = dataclasses.replace(PLANS["standard"], accuracy=False)
    medians, beside, held = [], [], []
    for _ in range(repeats):
        run = agent_run(session, plan, variant)
        (summary,) = summarize(run)
        if not summary.verdict.valid or summary.p50_ms is None:
            print(f"  left out: {'; '.join(summary.verdict.reasons)}")
            continue
        as_many = dataclasses.replace(plan, min_samples=summary.n // plan.processes)
        other = [t for _ in range(plan.processes) for t in bare(bundle, artifact, variant, as_many, folder)]
        medians.append(summary.p50_ms)
        beside.append(statistics.median(other) / 1e6)
        held.append(summary.p50_interval_ms)
    if len(medians) < 2:
        print(f"{variant.artifact:22s} {variant.runtime:12s} too few of {repeats} repetitions are VALID for a deviation")
        return
    middle = statistics.median(medians)
    ratios = [a / b for a, b in zip(medians, beside, strict=True)]
    print(
        f"{variant.artifact:22s} {variant.runtime:12s} standard p50 {middle:.3f} ms, std {_share(medians):.2f} % "
        f"({min(medians):.3f} to {max(medians):.3f}); bare loop beside it: std {_share(beside):.2f} %; their ratio "
        f"{statistics.median(ratios):.4f}, std {_share(ratios):.2f} %; {len(medians)} of {repeats} VALID, "
        f"{sum(1 for i in held if i is not None and i[0] <= middle <= i[1])} intervals hold the median",
        flush=True,
    )


def _share(values: list[float]) -> float:
    """Standard deviation in percent of the mean."""
    return 100 * statistics.stdev(values) / statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the digits model with random weights, int8-dynamic")
    parser.add_argument("--rounds", type=int, default=10, help="of part 1")
    parser.add_argument("--samples", type=int, default=300, help="of each process of part 1")
    parser.add_argument("--repeats", type=int, default=10, help="of part 2; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = open_bundle(a.bundle or build_digits(Path(scratch) / "digits"), None)
        with open_session(local_target()) as session:
            facts = session.agent.probe()
            session.agent.install(bundle)
            found = list_variants(bundle.manifest, bundle.digest, facts, session.profile(facts), threads=(a.threads,))
            places = []
            for number, variant in enumerate(found.variants):
                artifact, folder = bundle.manifest.artifact(variant.artifact), Path(scratch) / str(number)
                folder.mkdir()
                if artifact is not None:
                    places.append((session, bundle, artifact, variant, folder))
            for place in places:
                compare_with_bare(*place, a.rounds, a.samples)
            for place in places if a.repeats else ():
                repeat_standard(*place, a.repeats)


if __name__ == "__main__":
    main()
