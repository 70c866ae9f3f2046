"""A million samples in ten thousand runs: how long the store takes to answer, on SQLite and on PostgreSQL.

python benchmarks/big_store.py [--runs 10000] [--only sqlite|postgresql]

PostgreSQL is a throw-away server of Debian's package. Commands are whole: a fresh process from its start to its exit; the best
and the median of five, and the CPU time of the process, to which a busy machine does not add. The goal: one second for
``results list``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from device_agents.wire import InstalledBundle, Run, Series
from edgevit.results import schema
from edgevit.results.rows import insert_run, keep_summaries
from edgevit.results.store import Store
from tests.support.postgres import Postgres, find_postgres
from tests.support.runs import facts, measurement, run, sha

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 100
PROCESSES = 4
RUNS_A_BATCH = 20


def make_run(number: int, rng: random.Random) -> Run:
    """One variant of one of twenty bundles on one of ten targets, in four processes of 25 samples."""
    target, name = f"pi-{number % 10:02}", f"model-{number // 10 % 20:02}"
    like = measurement(samples=1, processes=1, accuracy=None, accuracy_absent="not scored").series[0]
    level = 20e6 * rng.lognormvariate(0, 0.02)

    def series(process: int) -> Series:
        samples = tuple(int(level * rng.lognormvariate(0, 0.03)) for _ in range(SAMPLES // PROCESSES))
        return dataclasses.replace(like, process=process, samples_ns=samples)

    m = measurement(samples=0, accuracy=None, accuracy_absent="not scored", bundle_name=name)
    bundle = sha(f"{name} {number // 2000}")
    m = dataclasses.replace(
        m, variant=dataclasses.replace(m.variant, bundle=bundle), series=tuple(map(series, range(PROCESSES)))
    )
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_735_000_000 + 600 * number))
    there = facts(target, bundles=(InstalledBundle(bundle, name, 1_700_000_000 + number // 2000),))
    made = run(target, f"batch-{number // RUNS_A_BATCH:05}", f"run-{number:06}", (m,), started_at=at, ended_at=at, facts=there)
    plan = dataclasses.replace(made.job.plan, processes=PROCESSES, min_samples=SAMPLES // PROCESSES)
    return dataclasses.replace(made, governor="performance", job=dataclasses.replace(made.job, plan=plan, submitted_at=at))


def fill(url: str, count: int) -> float:
    """Many runs in one transaction: what is timed here is reading."""
    rng = random.Random(1)
    began = time.perf_counter()
    with Store(url) as store:
        for start in range(0, count, 500):
            some = [make_run(i, rng) for i in range(start, min(start + 500, count))]
            with store._writing.begin() as connection:
                rows = {r.job.batch_id: r.job.submitted_at for r in some}
                known = set(connection.execute(schema.batches.select().with_only_columns(schema.batches.c.batch_id)).scalars())
                new = [{"batch_id": b, "created_at": at, "command": "bench"} for b, at in rows.items() if b not in known]
                if new:
                    connection.execute(schema.batches.insert(), new)
                for one in some:
                    insert_run(connection, one)
                keep_summaries(connection, some)
    return time.perf_counter() - began


def time_command(url: str, *argv: str) -> str:
    taken, worked = [], []
    environment = {**os.environ, "EDGEVIT_DB": url}
    for _ in range(5):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "edgevit", *argv], check=True, capture_output=True, cwd=ROOT, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(time.perf_counter() - began)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{min(taken):5.2f} s best, {statistics.median(taken):5.2f} s median, {min(worked):5.2f} s of CPU"


def measure(name: str, url: str, count: int) -> None:
    print(f"{name}: {count:,} runs, {count * SAMPLES:,} samples written in {fill(url, count):.0f} s", flush=True)
    for argv in (
        ("--version",),
        ("results", "list"),
        ("results", "list", "--limit", "0"),
        ("results", "show", "batch-00003"),
        ("results", "history", "model-03", "pi-04"),
    ):
        print(f"  edgevit {' '.join(argv):40} {time_command(url, *argv)}", flush=True)
    with Store(url) as store:
        for what, ask in (("every summary", store.summaries), ("every outline", store.outlines)):
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
        programs = find_postgres()
        if programs is None:
            sys.exit("no PostgreSQL server here: sudo apt install postgresql")
        server = Postgres(programs)
        try:
            server.start()
            measure("PostgreSQL", server.new_database(), given.runs)
        finally:
            server.close()


if __name__ == "__main__":
    main()
