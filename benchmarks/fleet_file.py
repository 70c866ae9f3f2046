"""How long a large fleet file takes to be read and validated whole, in a fresh process, imports included.

    python benchmarks/fleet_file.py [--lines 10000] [--rounds 5]

Two forms: four lines a target, as people write it, and one flow mapping a line. CPU seconds, which other load moves little.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

GOAL_S = 2.0
READ = """
import sys, time
from pathlib import Path
from edgevit.fleet.inventory import load_fleet, select
fleet = load_fleet(Path(sys.argv[1]))
select(fleet, ["tag:rack-7"])
print(len(fleet.targets), time.process_time())
"""


def block(lines: int) -> str:
    """Four lines a target."""
    out = ["schema: edgevit.fleet/1", "groups:", "  lab:", "    user: pi", "    profile: raspberry-pi-4b", "targets:"]
    for i in range((lines - len(out)) // 4):
        out += [f"  box-{i:05d}:", f"    host: 10.0.{i // 256}.{i % 256}", "    group: lab", f"    tags: [rack-{i % 40}]"]
    return "\n".join(out) + "\n"


def flow(lines: int) -> str:
    """One line a target."""
    entry = "  box-{i:05d}: {{host: 10.0.{a}.{b}, profile: raspberry-pi-4b, tags: [rack-{r}]}}"
    rows = [entry.format(i=i, a=i // 256, b=i % 256, r=i % 40) for i in range(lines - 2)]
    return "\n".join(["schema: edgevit.fleet/1", "targets:", *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("four lines a target", block), ("one line a target", flow)):
            path = Path(folder) / "fleet.yaml"
            path.write_text(make(given.lines))
            times, targets = [], 0
            for _ in range(given.rounds):
                argv = [sys.executable, "-c", READ, str(path)]
                said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
                targets = int(said[0])
                times.append(float(said[1]))
            found[name] = statistics.median(times)
            print(f"{name}: {given.lines:,} lines, {targets:,} targets: {found[name]:.2f} s of CPU (median of {given.rounds})")
    print(f"goal for the first ≤ {GOAL_S} s")
    return int(found["four lines a target"] > GOAL_S)


if __name__ == "__main__":
    raise SystemExit(main())
