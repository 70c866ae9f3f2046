"""The plans by which variants are measured, and what a command line changes of them. Pure.

``quick`` and ``standard`` give figures to rank and to choose by; ``sustained`` shows what heat does over minutes; ``compare``
tells two variants apart that differ by little. docs/measuring.md says what each figure means.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from device_agents.wire import Facts, RunPlan, Variant
from edgevit.errors import UsageError

COMPARE_BLOCKS = 8
SUSTAINED_MINUTES = 10.0

PLANS: dict[str, RunPlan] = {
    plan.name: plan
    for plan in (
        # At most 10 s a variant on an ordinary board, start-up included: ≤ 2.5 s of warm-up, ≤ 5 s timed. 64 samples are the
        # least an early-stopping p90 estimate exists for (MLPerf LoadGen, confidence 0.99, tolerance 0).
        RunPlan(
            name="quick",
            processes=1,
            warmup_iterations=5,
            warmup_seconds=0.3,
            min_samples=64,
            min_seconds=1.0,
            max_seconds=5.0,
            accuracy=True,
        ),
        # Three fresh processes, since latency differs from process to process; 3 × 221 ≥ 662 samples allow a p99.
        RunPlan(
            name="standard",
            processes=3,
            warmup_iterations=10,
            warmup_seconds=1.0,
            min_samples=221,
            min_seconds=3.0,
            max_seconds=60.0,
            accuracy=True,
        ),
        # Little warm-up: the first minute is half of what is to be seen.
        RunPlan(
            name="sustained",
            processes=1,
            warmup_iterations=3,
            warmup_seconds=0.3,
            min_samples=1,
            min_seconds=60.0 * SUSTAINED_MINUTES,
            max_seconds=60.0 * SUSTAINED_MINUTES,
            accuracy=False,
            sustained=True,
        ),
        # Short series: the less time between A and B, the more of what drifts do they share.
        RunPlan(
            name="compare",
            processes=2 * COMPARE_BLOCKS,
            warmup_iterations=5,
            warmup_seconds=0.3,
            min_samples=32,
            min_seconds=1.0,
            max_seconds=10.0,
            accuracy=False,
            order="mirrored",
        ),
    )
}


def ranks(plan: RunPlan) -> bool:
    """Whether its figures are to choose a variant by. Those of minutes of heat, or of a pair of variants, answer other
    questions."""
    return not plan.sustained and plan.order != "mirrored"


def with_minutes(plan: RunPlan, minutes: float) -> RunPlan:
    """A sustained plan of another length. UsageError for any other plan."""
    if not plan.sustained:
        raise UsageError(
            f"--minutes is for --plan sustained, got --plan {plan.name}", hint="edgevit bench BUNDLE TARGET --plan sustained"
        )
    return dataclasses.replace(plan, min_seconds=60.0 * minutes, max_seconds=60.0 * minutes)


def with_blocks(plan: RunPlan, blocks: int) -> RunPlan:
    """A comparing plan of ``blocks`` ABBA blocks. UsageError for any other plan."""
    if plan.order != "mirrored":
        raise UsageError(
            f"--blocks is for comparing two bundles, got --plan {plan.name}", hint="edgevit bench A --against B TARGET"
        )
    return dataclasses.replace(plan, processes=2 * blocks)


def parse_cpus(text: str) -> tuple[int, ...]:
    """``0-3,5`` as the kernel writes lists of CPUs (cpuset(7)) → (0, 1, 2, 3, 5). UsageError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            message = f"got the CPUs {text!r}, expected a list such as 0-3 or 0,2"
            raise UsageError(message, hint="edgevit bench … --affinity 0-3")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) != len(found):
        raise UsageError(f"got the CPUs {text!r}, which name one of them twice", hint="edgevit bench … --affinity 0-3")
    return tuple(found)


def list_cpus(cpus: Iterable[int]) -> str:
    """The inverse of :func:`parse_cpus`: (0, 1, 2, 3, 5) → ``0-3,5``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], cpu]
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def memory_limit_mb(facts: Facts) -> float | None:
    """What a worker may hold on a board (10⁶ bytes): a fifth of its memory, at least 128 MB and at most 1 GB, is left to all
    the rest. None where the board does not tell its memory."""
    if facts.memory_mb is None:
        return None
    left = min(max(facts.memory_mb / 5, 128.0), 1000.0)
    return max(facts.memory_mb - left, 64.0)


def pair_variants(first: Iterable[Variant], second: Iterable[Variant]) -> tuple[list[Variant], list[Variant]]:
    """(A1, B1, A2, B2, …) for a comparing plan, and those that found no partner.

    Partners agree in runtime, provider and threads; where nothing does and there is one of each, those two are a pair.
    """
    a, b = list(first), list(second)
    pairs: list[Variant] = []
    alone: list[Variant] = []
    rest = list(b)
    for one in a:
        partner = next((v for v in rest if _place(v) == _place(one) and v != one), None)
        if partner is None:
            alone.append(one)
        else:
            rest.remove(partner)
            pairs += [one, partner]
    if not pairs and len(a) == len(b) == 1 and a != b:
        return [a[0], b[0]], []
    return pairs, alone + rest


def _place(variant: Variant) -> tuple[str, str, int]:
    return variant.runtime, variant.provider, variant.threads


def pairs_of(variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """The pairs of a comparing job, in its order."""
    return list(zip(variants[::2], variants[1::2], strict=False))
