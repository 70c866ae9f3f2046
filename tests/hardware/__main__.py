"""`make hardware`: the CUDA and TensorRT providers on a machine with an NVIDIA GPU, through real agent processes.

An environment with x86-64 ``onnxruntime-gpu`` and the CUDA libraries it wants is made in ``.cache/hardware`` from the package
index. CUDA must be proven; TensorRT is gone through where its libraries are there, else named with the reason. Each line is one
thing that held; the first that does not ends the run with status 1. Without a GPU: status 2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from device_agents import wire
from tests.support.agent_bundle import FAST_PLAN, AgentProcess, TinyBundle, make_bundle, make_job, make_signer

REQUIREMENTS = ("onnxruntime-gpu[cuda,cudnn]", "numpy")
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"

LOOP = """
import statistics, sys, time
import numpy as np
import onnxruntime as ort
path, provider = sys.argv[1:]
session = ort.InferenceSession(path, providers=[provider])
x = np.load(path + ".npy")
name = session.get_inputs()[0].name
bound = session.io_binding()
bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
bound.bind_output(session.get_outputs()[0].name, "cuda", 0)
def median(call):
    times = []
    for _ in range(400):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times[100:]) / 1e6
def on_the_gpu():
    session.run_with_iobinding(bound)
    bound.synchronize_outputs()
print(median(lambda: session.run(None, {name: x})), median(on_the_gpu))
"""
"""Two medians in ms: with the copies to the GPU and back, and with input and output left there."""


class Failed(Exception):
    """Something edgevit promises did not hold."""


def expect(held: bool, text: str) -> None:
    if not held:
        raise Failed(text)


def say(text: str) -> None:
    print(text, flush=True)


def make_environment(folder: Path) -> Path:
    """Its interpreter; made anew where it is not whole."""
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(REQUIREMENTS):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        stamp.write_text("\n".join(REQUIREMENTS))
    return python


def library_path(environment: Path) -> str:
    """Where the CUDA libraries of the environment lie, for the dynamic linker."""
    folders = sorted({str(path.parent) for path in environment.glob("lib/python*/site-packages/**/*.so.*")})
    return ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])


class Gpu:
    """One agent whose Python has ``onnxruntime-gpu``, with the tiny bundle installed."""

    def __init__(self, python: Path, environment: Path, scratch: Path) -> None:
        env = {"LD_LIBRARY_PATH": library_path(environment)}
        self.agent = AgentProcess(scratch / "root", str(python), env).upload()
        signer = make_signer(scratch / "keys")
        self.agent.allow(signer)
        self.bundle: TinyBundle = make_bundle(signer)
        self.agent.install(self.bundle)
        self.scratch, self.python, self.env = scratch, python, env

    def providers(self) -> dict[str, wire.ProviderFact]:
        facts = wire.decode(wire.Facts, self.agent.call("probe", timeout=900.0), "facts")
        found = {r.runtime: r for r in facts.runtimes}
        expect("onnxruntime" in found, f"onnxruntime is not proven: {facts.absent.get('onnxruntime')}")
        say(f"onnxruntime {found['onnxruntime'].version}: {', '.join(p.name for p in found['onnxruntime'].providers)}")
        return {p.name: p for p in found["onnxruntime"].providers}

    def measure(self, provider: str, run_id: str) -> wire.Series:
        job = make_job(self.bundle, run_id, self.bundle.variant(provider=provider), plan=FAST_PLAN, timeout=900.0)
        self.agent.call("submit", stdin=wire.encode(job))
        run = self.agent.follow(run_id, timeout=900.0)
        self.agent.call("ack", run_id)
        expect(run.status == "completed", f"{provider}: {run.reason}")
        series = run.measurements[0].series[0]
        expect(series.provider == provider, f"asked for {provider}, measured {series.provider}")
        expect(series.golden.passed, f"{provider}: golden outputs differ: {series.golden.reason}")
        return series

    def bare_loop(self, provider: str) -> tuple[float, float]:
        import numpy as np

        from tests.support.agent_bundle import normalised, tiny_images, tiny_onnx

        model = self.scratch / "model.onnx"
        model.write_bytes(tiny_onnx())
        np.save(f"{model}.npy", normalised(tiny_images(1)))
        argv = [str(self.python), "-c", LOOP, str(model), provider]
        done = subprocess.run(argv, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=600, check=False)
        expect(done.returncode == 0, f"the bare loop failed:\n{done.stderr[-2000:]}")
        with_copies, without = (float(word) for word in done.stdout.split())
        return with_copies, without


def p50_ms(series: wire.Series) -> float:
    return statistics.median(series.samples_ns) / 1e6


def work(gpu: Gpu) -> None:
    providers = gpu.providers()
    expect(CUDA in providers and providers[CUDA].proven, f"CUDA is not proven: {providers.get(CUDA)}")
    series = gpu.measure(CUDA, "cuda")
    with_copies, without = gpu.bare_loop(CUDA)
    say(f"{CUDA}: p50 {p50_ms(series):.3f} ms; a bare loop with copies {with_copies:.3f} ms, left on the GPU {without:.3f} ms")
    expect(p50_ms(series) > without, "the copies to the GPU and back are not in the timed region")
    if TENSORRT not in providers or not providers[TENSORRT].proven:
        reason = providers[TENSORRT].detail if TENSORRT in providers else "this build does not have it"
        say(f"{TENSORRT}: NOT RUN, stays unproven: {reason[:400]}")
        return
    cold, warm = gpu.measure(TENSORRT, "cold"), gpu.measure(TENSORRT, "warm")
    expect((cold.engine_cache, warm.engine_cache) == ("cold", "warm"), f"cache: {cold.engine_cache}, {warm.engine_cache}")
    loads = f"loads in {cold.init_time_ns / 1e9:.2f} s cold, {warm.init_time_ns / 1e9:.2f} s warm"
    say(f"{TENSORRT}: p50 {p50_ms(warm):.3f} ms; {loads}")
    expect(warm.init_time_ns < cold.init_time_ns, "a warm load takes no less than a cold one")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/hardware"), help="where the environment is kept")
    a = parser.parse_args()
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi", "-L"], check=False).returncode != 0:
        print(
            "there is no NVIDIA GPU here that nvidia-smi lists: the paths through CUDA and TensorRT stay unproven",
            file=sys.stderr,
        )
        return 2
    environment = a.cache.resolve()
    python = make_environment(environment)
    try:
        with tempfile.TemporaryDirectory(prefix="edgevit-gpu-") as scratch:
            work(Gpu(python, environment, Path(scratch)))
    except Failed as e:
        print(f"FAILED: {e}", file=sys.stderr)
        return 1
    print("everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
