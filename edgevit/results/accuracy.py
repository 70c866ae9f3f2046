"""Two variants on the same images: which of them is right more often, and how often they agree. Pure, standard library.

Images are paired, so only those on which exactly one of the two is right tell them apart: McNemar's exact test (*Note on the
sampling error of the difference between correlated proportions or percentages*, Psychometrika 12, 1947) is that of a fair coin
over them. The difference has Bonett and Price's interval and the agreement Wilson's, both of which hold for few images too
(Fagerland, Lydersen and Laake, *Recommended tests and confidence intervals for paired binomial proportions*, Statistics in
Medicine 33, 2014; Wilson, JASA 22, 1927).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class PairedAccuracy:
    """B against A on ``images`` images. Shares are of 1; intervals hold at 95 % confidence.

    ``only_a`` and ``only_b``: images that only one of them has right. ``p_value``: the probability of so uneven a split, or one
    more uneven, were both right equally often. ``agreement``: the share of images with the same answer, right or wrong.
    """

    images: int
    a_top1: float
    b_top1: float
    difference: float
    difference_interval: tuple[float, float]
    only_a: int
    only_b: int
    p_value: float
    agreement: float
    agreement_interval: tuple[float, float]


def compare_accuracy(a: Sequence[int], b: Sequence[int], labels: Sequence[int]) -> PairedAccuracy:
    """Class indices that A and B gave for the same images, and the right ones. ValueError where there are none, or not equally
    many."""
    images = len(labels)
    if not images or len(a) != images or len(b) != images:
        raise ValueError(f"got {len(a)} and {len(b)} predictions for {images} labels")
    a_right = sum(x == y for x, y in zip(a, labels, strict=True))
    b_right = sum(x == y for x, y in zip(b, labels, strict=True))
    only_a = sum(x == y != z for x, z, y in zip(a, b, labels, strict=True))
    only_b = b_right - (a_right - only_a)
    same = sum(x == z for x, z in zip(a, b, strict=True))
    return PairedAccuracy(
        images=images,
        a_top1=a_right / images,
        b_top1=b_right / images,
        difference=(only_b - only_a) / images,
        difference_interval=difference_interval(only_a, only_b, images),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        agreement=same / images,
        agreement_interval=wilson(same, images),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact, two-sided p-value."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    # From the largest term down: what is 1e-18 of it changes nothing.
    term = math.exp(math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2.0))
    total, k = term, fewer
    while k > 0 and term > total * 1e-18:
        term *= k / (n - k + 1)
        k -= 1
        total += term
    return min(1.0, 2.0 * total)


def difference_interval(only_a: int, only_b: int, images: int) -> tuple[float, float]:
    """Of B's share less A's: Bonett and Price's adjusted Wald interval."""
    p, q = (only_a + 1) / (images + 2), (only_b + 1) / (images + 2)
    half = Z * math.sqrt((p + q - (q - p) ** 2) / (images + 2))
    return max(q - p - half, -1.0), min(q - p + half, 1.0)


def wilson(count: int, images: int) -> tuple[float, float]:
    """Of a share."""
    share, spread = count / images, Z * Z / images
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)
