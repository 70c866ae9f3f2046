"""The page of a large store: how long it takes to write, how large it is, how soon a browser shows it.

    python benchmarks/page.py [--runs 10000] [--db URL] [--repeats 3]

A store of N runs of 100 samples each over 20 targets is made first, by default in SQLite in a temporary folder; ``--db`` names
an empty database of its own, such as a PostgreSQL. Times are whole processes, Python's start included. Expected of 10,000 runs
and 1,000,000 samples: at most 5 s to write; of 1,000 runs: at most 3 MB beyond the data, 2 s until it stands in the browser.
The CPU time tells how much of the time a busy machine took.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sqlalchemy as sa  # noqa: E402

from edgevit.results import schema  # noqa: E402
from edgevit.results.store import Store  # noqa: E402
from tests.support.browser import Browser  # noqa: E402
from tests.support.runs import measurement, run  # noqa: E402

TARGETS = 20
FIRST, BEGAN = "b00000", "2025-02-01T00:00:00Z"
RECIPES = ("fp32", "int8-dynamic")
LIMITS = {"write 10,000 runs": 5.0, "open 1,000 runs": 2.0}


def fill(url: str, runs: int) -> None:
    """One measurement of 4 × 25 samples a run; a batch is one command over all targets. The first batch is added as runs are,
    the others are copies of its rows under names and times of their own."""
    with Store(url) as store:
        for i in range(TARGETS):
            recipe = RECIPES[i % 2]
            m = measurement(recipe, "onnx", 50.0 if recipe == "fp32" else 30.0, samples=25, processes=4, seed=i)
            one = run(f"pi-{i:02d}", FIRST, f"{FIRST}-pi-{i:02d}", measurements=(m,))
            store.add_run(dataclasses.replace(one, started_at=BEGAN, ended_at=BEGAN))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for number in range(1, runs // TARGETS):
            day, minute = divmod(number, 1440)
            began = f"2025-02-{1 + day:02d}T{minute // 60:02d}:{minute % 60:02d}:00Z"
            for table in (schema.batches, schema.runs, schema.measurements, schema.series, schema.summaries):
                connection.execute(copy_rows(table, f"b{number:05d}", began))
    engine.dispose()


def copy_rows(table: sa.Table, batch: str, began: str) -> sa.Insert:
    """The first batch's rows of ``table`` as those of ``batch``: its name stands in every id, also inside the documents."""

    def changed(column: sa.Column[Any]) -> Any:
        if not isinstance(column.type, sa.String):
            return column
        return sa.func.replace(sa.func.replace(column, FIRST, batch), BEGAN, began)

    of_first = (
        table.c.batch_id == FIRST
        if "run_id" not in table.c
        else table.c.run_id.in_([f"{FIRST}-pi-{i:02d}" for i in range(TARGETS)])
    )
    return table.insert().from_select(list(table.c.keys()), sa.select(*map(changed, table.c)).where(of_first))


def write(url: str, page: Path, repeats: int) -> tuple[float, float]:
    """Seconds and CPU seconds of `edgevit report --all -o PAGE`, the best of ``repeats``."""
    command = [sys.executable, "-m", "edgevit", "report", "--all", "-o", str(page)]
    environment = {**os.environ, "EDGEVIT_DB": url}
    found = []
    for _ in range(repeats):
        began, used = time.monotonic(), os.times()
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, cwd=ROOT)
        now = os.times()
        cpu = now.children_user + now.children_system - used.children_user - used.children_system
        found.append((time.monotonic() - began, cpu))
    return min(found)


def describe(name: str, page: Path, took: tuple[float, float], browser: Browser) -> dict[str, float]:
    text = page.read_text("utf-8")
    data = len(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0].encode("utf-8"))
    whole = len(text.encode("utf-8"))
    opened = []
    for _ in range(3):
        browser.show(page.as_uri())
        opened.append(float(browser.js("performance.now()")) / 1000)
    print(
        f"{name:>12}: written in {took[0]:.2f} s ({took[1]:.2f} s of CPU); {whole / 1e6:.2f} MB, "
        f"of them {(whole - data) / 1e6:.2f} MB beyond the data; "
        f"stands in the browser after {min(opened):.2f} s"
    )
    return {f"write {name}": took[0], f"open {name}": min(opened)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--db", help="an empty database; default: SQLite in a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:
        found: dict[str, float] = {}
        for runs in sorted({1000, options.runs}):
            url = options.db if options.db and runs == options.runs else f"sqlite:///{folder}/{runs}.sqlite"
            began = time.monotonic()
            fill(url, runs)
            print(f"made a store of {runs:,} runs in {time.monotonic() - began:.0f} s", flush=True)
            page = Path(folder) / f"{runs}.html"
            found |= describe(f"{runs:,} runs", page, write(url, page, options.repeats), browser)
    slow = [name for name, limit in LIMITS.items() if found.get(name, 0.0) > limit]
    for name in slow:
        print(f"{name}: {found[name]:.2f} s, at most {LIMITS[name]:.0f} s are wanted")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
