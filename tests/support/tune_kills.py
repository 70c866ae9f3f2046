"""A search whose operator is killed at random moments, again and again, until it is done: nothing is measured twice, and the
answer is that of the finished search."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from edgevit.results.store import Store

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    *("tune", "tests.support.models:tiny_vit", "--random-weights", "--target", "local", "--format", "onnx", "--threads", "1"),
    *("--max-loss", "100", "--trials", "6", "--confirm", "quick", "--anyway", "--jobs", "1", "--json"),
]


@dataclass
class Kills:
    """What the trials came to."""

    killed: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{self.killed} kills, {self.runs} runs in the store, {len(self.problems)} problems"


def tune_trials(folder: Path, seed: int, kills: int) -> Kills:
    """Kill one search ``kills`` times, each time 2 to 20 seconds after it went on, then let it end."""
    rng, tally = random.Random(seed), Kills()
    images = folder / "images"
    for i in range(20):
        place = images / f"colour{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    argv = [sys.executable, "-m", "edgevit", *WORDS, "--eval", str(images)]
    environment = {**os.environ, "EDGEVIT_HOME": str(folder / "home"), "HOME": str(folder)}
    environment.pop("EDGEVIT_DB", None)
    for _ in range(kills):
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(2, 20))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        tally.killed += 1
    answers = []
    for _ in range(2):
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
        if done.returncode != 0:
            tally.problems.append(f"seed {seed}: exit {done.returncode}: {done.stderr[-400:]}")
            return tally
        got = json.loads(done.stdout)
        answers.append((got["targets"][0]["winner"]["candidate"]["bundle"], [c["bundle"] for c in got["candidates"]]))
    if answers[0] != answers[1]:
        tally.problems.append(f"seed {seed}: the finished search answered {answers[0]}, then {answers[1]}")
    _count(folder / "home" / "data" / "results.sqlite", answers[0], seed, tally)
    return tally


def _count(database: Path, answer: tuple[str, list[str]], seed: int, tally: Kills) -> None:
    """Only the baseline and what was the best at some time may be in more than one job of the search."""
    with Store(f"sqlite:///{database}") as store:
        runs = store.runs()
    tally.runs = len(runs)
    jobs = [[v.bundle for v in r.job.variants] for r in runs if r.job.plan.name == "tune"]
    _, bundles = answer
    news = Counter(b for job in jobs for b in job[2:] if b != bundles[0])
    tally.problems += [f"seed {seed}: {b[:12]} was measured as new in {n} jobs" for b, n in news.items() if n > 1]
