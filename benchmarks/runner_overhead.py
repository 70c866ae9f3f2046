"""Does the agent add time of its own? Its p50 beside a bare loop over the same file, runtime, threads and process count.

Both sides use fresh processes, the same warm-up and number of samples, alternating A B A B …; the ratio of the medians over
rounds is the figure. Goal: within 2 %. Give a bundle directory to use another model than the digits'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from device_agents import wire
from edgevit.bench import make_job
from edgevit.bundle import Bundle, open_bundle

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
for _ in range(warmup):
    call()
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
    pre = bundle.manifest.preprocessing
    x = ((pixels.astype("float32") / 255) - np.float32(pre.mean)) / np.float32(pre.std)
    if artifact.input.layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    np.save(folder / "x.npy", np.ascontiguousarray(x.astype("float32")))
    model = folder / f"model.{artifact.format}"
    if not model.exists():
        model.write_bytes(bundle.blob_path(artifact.blob.sha256).read_bytes())
    argv = [str(model), variant.runtime, str(variant.threads), str(plan.warmup_iterations), str(plan.min_samples)]
    argv.append(str(folder / "x.npy"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the digits model with random weights, int8-dynamic")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    plan = wire.RunPlan("overhead", 1, 50, 0.0, a.samples, 0.0, 600.0, False)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = open_bundle(a.bundle or build_digits(Path(scratch) / "digits"), None)
        from edgevit.cli.connect import open_session
        from edgevit.fleet.inventory import local_target
        from edgevit.variants import list_variants

        with open_session(local_target()) as session:
            facts = session.agent.probe()
            session.agent.install(bundle)
            found = list_variants(bundle.manifest, bundle.digest, facts, session.profile(facts), threads=(a.threads,))
            for variant in found.variants:
                artifact = bundle.manifest.artifact(variant.artifact)
                if artifact is None or artifact.input.dtype != "float32":
                    continue
                folder = Path(scratch) / variant.artifact
                folder.mkdir()
                ratios, ours, theirs = [], [], []
                for _round in range(a.rounds):
                    job = make_job("local", "benchmark", plan, [variant])
                    session.agent.submit(job)
                    run = session.agent.follow(job.run_id)
                    session.agent.ack(job.run_id)
                    mine = statistics.median(run.measurements[0].series[0].samples_ns)
                    other = statistics.median(bare(bundle, artifact, variant, plan, folder))
                    ours.append(mine)
                    theirs.append(other)
                    ratios.append(mine / other)
                print(
                    f"{variant.artifact:20s} {variant.runtime:12s} agent p50 {statistics.median(ours) / 1e6:.3f} ms   "
                    f"bare p50 {statistics.median(theirs) / 1e6:.3f} ms   ratio {statistics.median(ratios):.4f} "
                    f"(per round {min(ratios):.3f} to {max(ratios):.3f}, n {len(ratios)})"
                )


if __name__ == "__main__":
    main()
