"""What one reading of each recorded board costs here, and what share of a core the sampler comes to over some seconds.

    python benchmarks/sampling_cost.py [SECONDS]

The trees are files on this machine's disk: a board's own ``/sys`` asks its hardware, so there each run records its own share
(``sampler_cpu``). This bounds what the reading itself takes, and shows that the cadence keeps to its budget.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from device_agents.boards import detect_board
from device_agents.boards.generic import GenericBoard
from device_agents.sampling import MAX_CPU, BoardSampler, read_board
from tests.support.boards import board_cases, lay_out_case
from tests.support.runs import measurement

READINGS = 50
ASKED = 10


def cost_ms(board: GenericBoard, full: bool, count: int) -> float:
    before = time.thread_time() + board.programs_cpu_s
    for _ in range(count):
        read_board(board, 0, full)
    return (time.thread_time() + board.programs_cpu_s - before) / count * 1000


def main(seconds: float) -> int:
    print(f"{'board':22} {'files ms':>9} {'all ms':>9} {'% of a core':>12} {'readings':>9} {'of all':>7}")
    worst = 0.0
    for case in board_cases():
        with tempfile.TemporaryDirectory() as folder:
            board = detect_board(lay_out_case(case, Path(folder)))
            read_board(board, 0, True)
            files, full = cost_ms(board, False, READINGS), cost_ms(board, True, ASKED)
            sampler = BoardSampler(board, 1.0)
            sampler.start()
            time.sleep(seconds)
            sampler.stop()
            made = sampler.record(measurement(processes=1).series[0])
            share = made.sampling.cpu if made.sampling else 0.0
            worst = max(worst, share)
            asked = sum(reading.full for reading in made.readings)
            print(f"{case:22} {files:9.3f} {full:9.3f} {100 * share:12.3f} {len(made.readings):9} {asked:7}", flush=True)
    print(f"worst {100 * worst:.3f} % of a core, the budget is {100 * MAX_CPU:.1f} %")
    return int(worst > MAX_CPU)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0))
