"""The page of a large store: how long it takes to write, how large it is, how soon a browser shows it.

    python benchmarks/page.py [--runs 10000] [--db URL]

A store of N runs of 100 samples each over 20 targets is made first (some minutes: each run is one durable transaction), by
default in SQLite in a temporary folder; ``--db`` names an empty database of its own, such as a PostgreSQL. Times are whole
processes, Python's start included. Expected of 10,000 runs and 1,000,000 samples: at most 5 s to write; of 1,000 runs: at most
3 MB beyond the data, and 2 s until it stands in the browser.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgevit.results.store import Store  # noqa: E402
from tests.support.browser import Browser  # noqa: E402
from tests.support.runs import measurement, run  # noqa: E402

TARGETS = 20
RECIPES = ("fp32", "int8-dynamic")
LIMITS = {"write 10,000 runs": 5.0, "open 1,000 runs": 2.0}


def fill(url: str, runs: int) -> None:
    """One measurement of 4 × 25 samples a run; a batch is one command over all targets."""
    made = [
        measurement(recipe, "onnx", 50.0 if recipe == "fp32" else 30.0, samples=25, processes=4, seed=seed)
        for seed in range(25)
        for recipe in RECIPES
    ]
    with Store(url) as store:
        for i in range(runs):
            batch, target = divmod(i, TARGETS)
            day, second = divmod(batch, 1440)
            one = run(f"pi-{target:02d}", f"b{batch:05d}", f"r{i:06d}", measurements=(made[i % len(made)],))
            started = f"2025-02-{1 + day:02d}T{second // 60:02d}:{second % 60:02d}:00Z"
            store.add_run(dataclasses.replace(one, started_at=started, ended_at=started))


def write(url: str, page: Path, *words: str) -> float:
    """Seconds of `edgevit report … -o PAGE`, the best of three."""
    command = [sys.executable, "-m", "edgevit", "report", *words, "-o", str(page)]
    environment = {**os.environ, "EDGEVIT_DB": url}
    found = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, cwd=ROOT)
        found.append(time.monotonic() - began)
    return min(found)


def describe(name: str, page: Path, seconds: float, browser: Browser) -> dict[str, float]:
    text = page.read_text("utf-8")
    data = len(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0].encode("utf-8"))
    whole = len(text.encode("utf-8"))
    opened = []
    for _ in range(3):
        browser.show(page.as_uri())
        opened.append(float(browser.js("performance.now()")) / 1000)
    print(
        f"{name:>12}: written in {seconds:.2f} s; {whole / 1e6:.2f} MB, of them {(whole - data) / 1e6:.2f} MB beyond the data; "
        f"stands in the browser after {min(opened):.2f} s"
    )
    return {f"write {name}": seconds, f"open {name}": min(opened)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--db", help="an empty database; default: SQLite in a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:
        found: dict[str, float] = {}
        for runs in sorted({1000, options.runs}):
            url = options.db if options.db and runs == options.runs else f"sqlite:///{folder}/{runs}.sqlite"
            began = time.monotonic()
            fill(url, runs)
            print(f"made a store of {runs:,} runs in {time.monotonic() - began:.0f} s", flush=True)
            page = Path(folder) / f"{runs}.html"
            found |= describe(f"{runs:,} runs", page, write(url, page, "--all"), browser)
    slow = [name for name, limit in LIMITS.items() if found.get(name, 0.0) > limit]
    for name in slow:
        print(f"{name}: {found[name]:.2f} s, at most {LIMITS[name]:.0f} s are wanted")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
