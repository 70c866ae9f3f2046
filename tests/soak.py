"""`make soak`: the long trials, with counts and seed printed. Not collected by pytest."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.support.kills import run_trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=60)
    a = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tally = run_trials(Path(scratch), a.seed, a.kills)
    print(f"kills, seed {a.seed}: {tally.text()}; {time.monotonic() - began:.0f} s")
    for problem in tally.problems:
        print(f"  PROBLEM {problem}")
    return int(bool(tally.problems))


if __name__ == "__main__":
    sys.exit(main())
