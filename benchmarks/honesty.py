"""Is a figure of ``bench`` what a person would measure by hand, and is it the same the next time?

1. The agent's own loading and timing beside a bare loop over the same file, input, runtime and threads. Each side is a fresh
   process; the two take turns of some calls, A B B A …, so that what drifts on the machine meets both alike. A pair of
   processes gives one ratio of medians; the figure is the median over pairs with its standard error. Goal: within 2 %.
2. ``standard``, repeated, through submit, queue, server and spool: the standard deviation of its p50 over the repetitions, that
   of a bare loop after each in as many processes and samples (so much is the machine's own), and how many of the intervals that
   are shown with it hold the median of all. A repetition that something falsified is named and left out.

Give a bundle directory to use another model than the digits'.
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
path, runtime, threads, x = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
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
while time.perf_counter() - begin < float(sys.argv[5]):
    call()
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        t = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - t)
    print(json.dumps(times), flush=True)
"""

AGENT = """
import json, pathlib, sys, time
import numpy as np
from device_agents import measure, wire
from device_agents.runtimes import load_backend
path, runtime, threads, x = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
artifact = wire.loads(wire.Artifact, open(path + ".json", "rb").read(), "artifact", wire.MAX_MANIFEST_BYTES)
session = load_backend(runtime).load(open(path, "rb").read(), sys.argv[6], threads, artifact,
    pathlib.Path(path).parent / "engines")
def turn(calls, seconds):
    return measure.time_calls(session.run, x, calls, seconds, 3600.0, lambda done: None).samples_ns
turn(1, float(sys.argv[5]))
for line in sys.stdin:
    print(json.dumps(turn(int(line), 0.0)), flush=True)
"""


class Side:
    """One process that times so many calls when asked, after ``warmup`` seconds of its own."""

    def __init__(self, code: str, place: Place, warmup: float) -> None:
        v = place.variant
        argv = [str(place.model), v.runtime, str(v.threads), str(place.input), str(warmup), v.provider]
        self._trouble = place.folder / "stderr.txt"
        with self._trouble.open("a") as stderr:
            self._process = subprocess.Popen([sys.executable, "-c", code, *argv], stdin=-1, stdout=-1, stderr=stderr, text=True)

    def turn(self, calls: int) -> list[int]:
        """Nanoseconds of each call."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise SystemExit("a side has no pipes")
        stdin.write(f"{calls}\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise SystemExit(f"a side has ended (exit {self._process.wait()}):\n{self._trouble.read_text()[-2000:]}")
        times: list[int] = json.loads(answer)
        return times

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclasses.dataclass(frozen=True)
class Place:
    """One variant with its file and its input on the disk."""

    session: Session
    variant: wire.Variant
    model: Path
    input: Path

    @property
    def folder(self) -> Path:
        return self.model.parent

    @property
    def name(self) -> str:
        return f"{self.variant.artifact:22s} {self.variant.runtime:12s}"


def make_place(session: Session, bundle: Bundle, artifact: wire.Artifact, variant: wire.Variant, folder: Path) -> Place:
    """Write what both sides read."""
    folder.mkdir()
    pixels = np.load(bundle.blob_path(bundle.manifest.golden.blob.sha256))[: artifact.batch]
    np.save(folder / "x.npy", prepare(pixels, bundle.manifest.preprocessing, artifact.input))
    model = folder / f"model.{artifact.format}"
    model.write_bytes(bundle.blob_path(artifact.blob.sha256).read_bytes())
    Path(f"{model}.json").write_bytes(wire.dumps(artifact))
    return Place(session, variant, model, folder / "x.npy")


def take_turns(place: Place, pairs: int, turns: int, calls: int) -> None:
    """Part 1, one line."""
    ratios = []
    for _ in range(pairs):
        sides = (Side(AGENT, place, 0.3), Side(BARE, place, 0.3))
        for side in sides:
            side.turn(calls)  # both are ready before the first turn that counts
        found = []
        for number in range(turns):
            medians = [0.0, 0.0]
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                medians[i] = statistics.median(sides[i].turn(calls))
            found.append(medians[0] / medians[1])
        for side in sides:
            side.end()
        ratios.append(statistics.median(found))
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    print(
        f"{place.name} agent ÷ bare {statistics.median(ratios):.4f} ± {error:.4f} "
        f"(pairs {min(ratios):.3f} to {max(ratios):.3f}, {pairs} of {turns} turns of {calls} calls)",
        flush=True,
    )


def repeat_standard(place: Place, repeats: int) -> None:
    """Part 2, one line and what falsified any."""
    plan = dataclasses.replace(PLANS["standard"], accuracy=False)
    medians, beside, held = [], [], []
    for _ in range(repeats):
        job = make_job("local", "benchmark", plan, [place.variant])
        place.session.agent.submit(job)
        run = place.session.agent.follow(job.run_id)
        place.session.agent.ack(job.run_id)
        (summary,) = summarize(run)
        if not summary.verdict.valid or summary.p50_ms is None:
            print(f"  left out: {'; '.join(summary.verdict.reasons)}", flush=True)
            continue
        times: list[int] = []
        for _ in range(plan.processes):
            side = Side(BARE, place, plan.warmup_seconds)
            times += side.turn(summary.n // plan.processes)
            side.end()
        medians.append(summary.p50_ms)
        beside.append(statistics.median(times) / 1e6)
        held.append(summary.p50_interval_ms)
    if len(medians) < 2:
        print(f"{place.name} too few of {repeats} repetitions are VALID for a deviation")
        return
    middle = statistics.median(medians)
    ratios = [a / b for a, b in zip(medians, beside, strict=True)]
    print(
        f"{place.name} standard p50 {middle:.3f} ms, std {_share(medians):.2f} % ({min(medians):.3f} to {max(medians):.3f}); "
        f"bare loop after each: std {_share(beside):.2f} %; ratio {statistics.median(ratios):.4f}, std {_share(ratios):.2f} %; "
        f"{len(medians)} of {repeats} VALID, {sum(i is not None and i[0] <= middle <= i[1] for i in held)} intervals hold the "
        "median",
        flush=True,
    )


def _share(values: list[float]) -> float:
    """Standard deviation in percent of the mean."""
    return 100 * statistics.stdev(values) / statistics.fmean(values)


def build_digits(out: Path) -> Path:
    """The digits model with random weights: what it answers does not matter here."""
    from edgevit.cli import run_cli

    argv = ["build", "edgevit.digits:digits_vit", "--random-weights", "--recipe", "int8-dynamic", "--for", "local"]
    if run_cli([*argv, "-o", str(out)]) != 0:
        raise SystemExit("the bundle could not be built")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the digits model with random weights, int8-dynamic")
    parser.add_argument("--pairs", type=int, default=12, help="of processes, in part 1; 0 leaves it out")
    parser.add_argument("--turns", type=int, default=16, help="of each pair")
    parser.add_argument("--calls", type=int, default=60, help="in a turn")
    parser.add_argument("--repeats", type=int, default=10, help="of part 2; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = open_bundle(a.bundle or build_digits(Path(scratch) / "digits"), None)
        with open_session(local_target()) as session:
            facts = session.agent.probe()
            session.agent.install(bundle)
            found = list_variants(bundle.manifest, bundle.digest, facts, session.profile(facts), threads=(a.threads,))
            artifacts = [(v, bundle.manifest.artifact(v.artifact)) for v in found.variants]
            places = [
                make_place(session, bundle, artifact, variant, Path(scratch) / str(number))
                for number, (variant, artifact) in enumerate(artifacts)
                if artifact is not None
            ]
            for place in places if a.pairs else ():
                take_turns(place, a.pairs, a.turns, a.calls)
            for place in places if a.repeats else ():
                repeat_standard(place, a.repeats)


if __name__ == "__main__":
    main()
