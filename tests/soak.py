"""`make soak`: the long trials, with counts and seed printed. Not collected by pytest."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.support.agent_bundle import make_signer
from tests.support.cuts import run_cuts
from tests.support.deploy_kills import deploy_trials
from tests.support.fuzz import fuzz, make_readers
from tests.support.kills import run_trials
from tests.support.sabotage import kill_steps
from tests.support.tune_kills import tune_trials


class Tally(Protocol):
    """What trials came to."""

    problems: list[str]

    def text(self) -> str: ...


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=60, help="of host or agent at random moments of deploy and bench")
    parser.add_argument("--deploys", type=int, default=100, help="kills of the operator while it deploys to three devices")
    parser.add_argument("--steps", type=float, default=1.0, help="share of the agent's steps that are killed before")
    parser.add_argument("--cuts", type=int, default=20, help="of one upload's connection at random points")
    parser.add_argument("--searches", type=int, default=8, help="kills of an operator who searches for a recipe")
    parser.add_argument("--inputs", type=int, default=100_000, help="damaged inputs for the readers of untrusted bytes")
    a = parser.parse_args()
    problems: list[str] = []

    def told(what: str, work: Callable[[Path], Tally]) -> None:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            tally = work(Path(scratch))
        print(f"{what}, seed {a.seed}: {tally.text()}; {time.monotonic() - began:.0f} s", flush=True)
        problems.extend(f"{what}: {text}" for text in tally.problems)

    told("fuzzing", lambda folder: fuzz(make_readers(folder, make_signer(folder / "keys")), a.seed, a.inputs))
    told("cuts of an upload", lambda folder: run_cuts(folder, a.seed, a.cuts))
    told("kills at every step", lambda folder: kill_steps(folder / "work", make_signer(folder / "keys"), a.seed, a.steps))
    told("kills at random moments", lambda folder: run_trials(folder, a.seed, a.kills))
    told("operators killed while they deploy", lambda folder: deploy_trials(folder, a.seed, a.deploys))
    told("searches killed at random moments", lambda folder: tune_trials(folder, a.seed, a.searches))
    for problem in problems:
        print(f"  PROBLEM {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
