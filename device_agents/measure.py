"""The timed loop and what is read around it. Nothing here knows a runtime."""

from __future__ import annotations

import gc
import os
import time
from array import array
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from device_agents import wire
from device_agents.boards.files import read_text

MB = 1e6
FOREIGN_CPU_AFTER_S = 0.5
"""The kernel counts CPU time in ticks of 10 ms a CPU: over less than this, the load of others drowns in rounding, and a single
thread that was made to wait for a moment looks like a crowd."""


@dataclass(frozen=True)
class Timed:
    """Every ``stride``-th call's time in ns, and of a sustained part what each second gave."""

    samples_ns: Tuple[int, ...]
    stride: int
    windows: Tuple[wire.Window, ...]


def time_calls(
    call: Callable[[Any], Any],
    x: Any,
    min_calls: int,
    min_seconds: float,
    max_seconds: float,
    alive: Callable[[int], None],
    max_kept: int = 10_000_000,
    window_seconds: float = 0.0,
) -> Timed:
    """Call ``call(x)`` until both lower bounds are reached, or ``max_seconds``.

    ``alive`` is told the number of calls about once a second, between two of them and outside the timed region. The garbage
    collector rests meanwhile: a collection in the middle of a call is no property of the model. Of more than ``max_kept`` times
    every second is dropped and from then on every second is kept, and so on: what stays is spread evenly over all of them.
    ``window_seconds``: sum up each such stretch of time as a :class:`~device_agents.wire.Window`; 0 for none.
    """
    clock = time.perf_counter_ns
    kept, window = array("q"), array("q")
    windows: List[wire.Window] = []
    calls, stride = 0, 1
    length = int(window_seconds * 1e9)
    shortest, longest = int(min_seconds * 1e9), int(max_seconds * 1e9)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = said = opened = clock()
        while True:
            now = clock()
            spent = now - start
            if length and window and now - opened >= length:
                windows.append(_close(window, opened - start, now - opened))
                window, opened = array("q"), now
            if (calls >= min_calls and spent >= shortest) or (calls and spent >= longest):
                if window:
                    windows.append(_close(window, opened - start, now - opened))
                return Timed(tuple(kept), stride, tuple(windows))
            if now - said >= 1_000_000_000:
                said = now
                alive(calls)
            before = clock()
            call(x)
            after = clock()
            if calls % stride == 0:
                kept.append(after - before)
            calls += 1
            if length:
                window.append(after - before)
            if len(kept) > max_kept:
                kept, stride = kept[::2], stride * 2
    finally:
        if was_enabled:
            gc.enable()


def _close(window: "array[int]", at_ns: int, duration_ns: int) -> wire.Window:
    ordered = sorted(window)
    return wire.Window(
        at_ms=at_ns // 1_000_000,
        duration_ms=duration_ns // 1_000_000,
        count=len(ordered),
        p50_ns=ordered[(len(ordered) - 1) // 2],
        max_ns=ordered[-1],
    )


def warm_up(call: Callable[[Any], Any], x: Any, plan: wire.RunPlan, alive: Callable[[int], None]) -> Tuple[int, ...]:
    """Untimed for the result, yet kept: how long a model takes to settle is worth seeing. Takes at most half as long as the
    timed part may, or ``warmup_seconds`` where that is longer, so that a slow model does not wait for all its iterations."""
    if plan.warmup_iterations == 0 and plan.warmup_seconds == 0:
        return ()
    bound = max(plan.max_seconds / 2, plan.warmup_seconds)
    return time_calls(call, x, plan.warmup_iterations, plan.warmup_seconds, bound, alive).samples_ns


@dataclass(frozen=True)
class Moment:
    """Counters of the kernel at one moment; differences of two say what happened between them."""

    monotonic_ns: int
    wall_ns: int
    own_cpu_s: float
    busy_cpu_s: Optional[float]
    swapped_pages: Optional[int]
    waited_s: Dict[int, float]


def read_moment() -> Moment:
    return Moment(
        monotonic_ns=time.monotonic_ns(),
        wall_ns=time.time_ns(),
        own_cpu_s=time.process_time(),
        busy_cpu_s=parse_busy_cpu(read_text(_proc("stat"), 1_000_000) or "", os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0)),
        swapped_pages=parse_swapped_pages(read_text(_proc("vmstat")) or ""),
        waited_s=_read_waited(),
    )


@dataclass(frozen=True)
class Between:
    """What happened between two moments, in the terms of :class:`~device_agents.wire.Series`."""

    own_cpu: Optional[float]
    foreign_cpu: Optional[float]
    swapped_pages: Optional[int]
    clock_step_ms: float
    waiting: Optional[float]


def compare_moments(a: Moment, b: Moment) -> Between:
    """Cores kept busy by this process and by others, pages swapped, how far the wall clock was set, and how long this process's
    threads waited for a CPU. A thread that ended in between takes its waiting along; one that began counts from its start."""
    seconds = max(b.monotonic_ns - a.monotonic_ns, 1) / 1e9
    own = (b.own_cpu_s - a.own_cpu_s) / seconds
    foreign = None
    if a.busy_cpu_s is not None and b.busy_cpu_s is not None and seconds >= FOREIGN_CPU_AFTER_S:
        foreign = max((b.busy_cpu_s - a.busy_cpu_s) / seconds - own, 0.0)
    swapped = None
    if a.swapped_pages is not None and b.swapped_pages is not None:
        swapped = max(b.swapped_pages - a.swapped_pages, 0)
    waiting = None
    if a.waited_s and b.waited_s and seconds >= FOREIGN_CPU_AFTER_S:
        waiting = sum(max(total - a.waited_s.get(thread, 0.0), 0.0) for thread, total in b.waited_s.items()) / seconds
    step = ((b.wall_ns - a.wall_ns) - (b.monotonic_ns - a.monotonic_ns)) / 1e6
    return Between(own_cpu=max(own, 0.0), foreign_cpu=foreign, swapped_pages=swapped, clock_step_ms=step, waiting=waiting)


def parse_busy_cpu(stat: str, ticks_per_s: int, cpus: Iterable[int]) -> Optional[float]:
    """``/proc/stat`` → CPU seconds spent on anything but idling and waiting (proc(5): user nice system idle iowait irq …).

    Only of ``cpus``, those this process may run on: what others do elsewhere takes nothing from it. None where one is absent.
    """
    wanted = {"cpu{}".format(number) for number in cpus}
    found = 0
    busy = 0
    for line in stat.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0] in wanted:
            values = [int(v) for v in words[1:9]]
            busy += sum(values) - values[3] - (values[4] if len(values) > 4 else 0)
            found += 1
    return busy / ticks_per_s if found and found == len(wanted) else None


def parse_waited(schedstat: str) -> Optional[float]:
    """``/proc/PID/task/TID/schedstat`` → seconds the thread stood ready and had no CPU (its second number, in ns: Linux kernel,
    Documentation/scheduler/sched-stats.rst). None for anything else."""
    words = schedstat.split()
    return int(words[1]) / 1e9 if len(words) == 3 and words[1].isdigit() else None


def _read_waited() -> Dict[int, float]:
    """Of each thread of this process; empty where the kernel does not tell."""
    found = {}
    for folder in _proc("self/task").glob("[0-9]*"):
        waited = parse_waited(read_text(folder / "schedstat") or "")
        if waited is not None:
            found[int(folder.name)] = waited
    return found


def parse_swapped_pages(vmstat: str) -> Optional[int]:
    """``/proc/vmstat`` → pages swapped in and out since boot."""
    found = [int(line.split()[1]) for line in vmstat.splitlines() if line.startswith(("pswpin ", "pswpout "))]
    return sum(found) if len(found) == 2 else None


def resident_mb() -> Optional[float]:
    """This process's resident memory in MB (10⁶ bytes)."""
    text = read_text(_proc("self/statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB if text else None


def peak_mb() -> Optional[float]:
    """The most this process ever had resident (``VmHWM``), in MB."""
    for line in (read_text(_proc("self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    return None


def _proc(name: str) -> Any:
    from pathlib import Path

    return Path("/proc") / name
