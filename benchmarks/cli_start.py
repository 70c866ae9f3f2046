"""How long `edgevit --help` and `edgevit profiles` take as whole processes, beside a bare Python start. Goal: under 0.3 s."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "edgevit --help": [sys.executable, "-m", "edgevit", "--help"],
    "edgevit profiles": [sys.executable, "-m", "edgevit", "profiles"],
}
ROUNDS = 15


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, argv in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - began)
    for name, values in times.items():
        print(
            f"{name:18s} median {1000 * statistics.median(values):6.0f} ms   min {1000 * min(values):6.0f} ms   n {len(values)}"
        )


if __name__ == "__main__":
    main()
