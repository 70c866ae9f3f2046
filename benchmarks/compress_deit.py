"""How long compression without training takes, and its peak memory: one cold `edgevit build` a recipe, on any model and images.

    python benchmarks/compress_deit.py --weights deit_tiny_patch16_224.safetensors --calib FOLDER [--eval DATA] [RECIPE…]

Each build is a process of its own with an empty cache, so nothing is taken from an earlier one. Besides the clock there is the
CPU time of the process and its children, which other work on the machine hardly moves: on a quiet core it is the least the
clock can show. Peak memory is the largest resident size of the process, as the kernel counts it. Goal for DeiT-Tiny with 128
calibration images on two cores: at most 180 s and 4,096 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = (
    "int8-dynamic",
    "int8-static",
    "int8-weights",
    "int4-weights",
    "int4-channel",
    "mixed",
    "small",
    "merge-tokens",
    "merge-int8",
    "low-rank",
    "prune",
    "prune-int8",
    "prune-merge",
)
"""Every technique without training, and its pairs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--format", default="onnx", choices=("onnx", "tflite", "all"))
    parser.add_argument("--profile", default="generic-x86-64")
    a = parser.parse_args()
    print(f"{'recipe':16s} {'build s':>8s} {'CPU s':>8s} {'steps s':>8s} {'peak MB':>8s}   {os.cpu_count()} cores, {a.format}")
    for recipe in a.recipes:
        seconds, busy, steps, peak = measure(a, recipe)
        told = f"{steps:8.1f}" if steps is not None else f"{'–':>8s}"
        print(f"{recipe:16s} {seconds:8.1f} {busy:8.1f} {told} {peak:8.0f}", flush=True)


def measure(a: argparse.Namespace, recipe: str) -> tuple[float, float, float | None, float]:
    """(seconds of the command, its CPU seconds, seconds of the recipe's steps where they say, peak MB) of one build that
    starts from an empty home."""
    with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
        argv = [sys.executable, "-m", "edgevit", "build", a.model, "--weights", str(a.weights), "--recipe", recipe]
        argv += ["--profile", a.profile, "--format", a.format, "--calib", str(a.calib), "-o", f"{scratch}/bundle", "--json"]
        argv += ["--eval", str(a.eval)] if a.eval else []
        began = time.monotonic()
        with open(f"{scratch}/out", "w+b") as out, open(f"{scratch}/err", "w+b") as err:
            process = subprocess.Popen(argv, stdout=out, stderr=err, env={**os.environ, "EDGEVIT_HOME": f"{scratch}/home"})
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - began
            out.seek(0)
            err.seek(0)
            document, said = out.read(), err.read().decode()
        if status:
            raise SystemExit(f"{recipe}: exit {os.waitstatus_to_exitcode(status)}\n{said[-2000:]}")
        # ru_maxrss is in KiB on Linux.
        peak = usage.ru_maxrss * 1024 / 1e6
    told = [s["seconds"] for s in json.loads(document)["bundles"][0]["manifest"]["steps"] if s["seconds"] is not None]
    return seconds, usage.ru_utime + usage.ru_stime, sum(told) if told else None, peak


if __name__ == "__main__":
    main()
