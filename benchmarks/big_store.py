"""A million samples in ten thousand runs: how long the store takes to answer, on SQLite and on PostgreSQL.

python benchmarks/big_store.py [--runs 10000] [--only sqlite|postgresql]

PostgreSQL is a throw-away server of Debian's package. Commands are whole: a fresh process from its start to its exit; the best
and the median of three, and the CPU time of the process, to which a busy machine does not add. The goal: one second for
``results list``.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import FIRST, fill
from edgevit.results.store import Store
from tests.support.postgres import running_postgres

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 100
REPEATS = 3


def time_command(url: str, *argv: str) -> str:
    taken, worked = [], []
    environment = {**os.environ, "EDGEVIT_DB": url}
    for _ in range(REPEATS):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "edgevit", *argv], check=True, capture_output=True, cwd=ROOT, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(time.perf_counter() - began)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{min(taken):5.2f} s best, {statistics.median(taken):5.2f} s median, {min(worked):5.2f} s of CPU"


def measure(name: str, url: str, count: int) -> None:
    fill(url, count)
    print(f"{name}: {count:,} runs, {count * SAMPLES:,} samples", flush=True)
    for argv in (
        ("--version",),
        ("results", "list"),
        ("results", "list", "--limit", "0"),
        ("results", "show", FIRST),
        ("results", "history", "deit-tiny-fp32", "pi-00"),
    ):
        print(f"  edgevit {' '.join(argv):40} {time_command(url, *argv)}", flush=True)
    with Store(url) as store:
        for what, ask in (
            ("the 50 newest batches", lambda: store.batches(50)),
            ("every batch", store.batches),
            ("every summary", store.summaries),
            ("every outline", store.outlines),
        ):
            began = time.perf_counter()
            found = len(ask())
            print(f"  {what + ', in the process':48} {time.perf_counter() - began:6.2f} s for {found:,}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    given = parser.parse_args()
    if given.only != "postgresql":
        with tempfile.TemporaryDirectory() as folder:
            measure("SQLite", f"sqlite:///{folder}/results.sqlite", given.runs)
    if given.only != "sqlite":
        with running_postgres() as server:
            measure("PostgreSQL", server.new_database(), given.runs)


if __name__ == "__main__":
    main()
