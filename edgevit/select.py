"""Which variant of a bundle a device should run, from what was measured on that very device. Pure.

First every variant that must not run is dropped, each with its reason; then the policy ranks those that are left:

- it failed, or gave other outputs than those recorded at build time;
- its figures are INVALID (unless asked for anyway);
- it loses more than ``max_loss`` points of top-1 against the float variant of the same bundle (the most accurate fp32, else
  fp16), counted on that device on the same images;
- it is int8 and slower than the fastest float variant of the same bundle on that device that loses no more itself.

A gate that cannot be held (no labelled images, no float artifact) is named in the choice, never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from device_agents.wire import Run, Variant
from edgevit.errors import NoChoice, UsageError
from edgevit.plans import ranks
from edgevit.results.reference import relate
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary
from edgevit.variants import name_variant

POLICIES = ("fastest", "smallest", "most-accurate")
MAX_LOSS = 1.0
"""Points of top-1 that a variant may lose against float. Careful post-training int8 of Vision Transformers loses less: DeiT-S
0.07 (APQ-ViT), Swin-T 0.05 (PTQ4ViT with bias compensation). Above a point the scheme suits the model ill."""

FLOAT_SCHEMES = ("fp32", "fp16")
FEW_IMAGES = 100
"""With fewer, one image weighs more than a point."""


@dataclass(frozen=True)
class Gates:
    """What a variant must hold: at most ``max_loss`` points of top-1 lost; VALID figures unless ``anyway``."""

    max_loss: float = MAX_LOSS
    anyway: bool = False


@dataclass(frozen=True)
class Dropped:
    """A variant that must not be chosen, and why."""

    variant: Variant
    reason: str


@dataclass(frozen=True)
class Admission:
    """The variants that may be chosen, those dropped, and the gates that could not be held with the reason."""

    admitted: tuple[Summary, ...]
    dropped: tuple[Dropped, ...]
    not_held: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What is to be active on one target, and the evidence: ``runs`` are ids in the results store.

    ``reason`` is the figure that decided; ``behind`` are the variants that might have been chosen, in the policy's order, each
    with its figure; ``dropped`` those that must not, ``not_measured`` those that run there and no figure is known of.
    """

    target: str
    bundle: str
    bundle_name: str
    policy: str
    max_loss: float
    anyway: bool
    variant: Variant
    reason: str
    runs: tuple[str, ...]
    behind: tuple[Dropped, ...]
    dropped: tuple[Dropped, ...]
    not_held: tuple[str, ...]
    not_measured: tuple[Variant, ...] = field(default=())


def variant_of(s: Summary) -> Variant:
    return Variant(s.bundle, s.artifact, s.runtime, s.provider, s.threads)


def choose(
    summaries: Sequence[Summary], policy: str, gates: Gates | None = None, not_measured: Sequence[Variant] = ()
) -> Choice:
    """The variant that ``policy`` wants of those measured: of one bundle on one target, in whatever order.

    Ties go to the other figures (time, then size), then to the variant's name, so the same evidence always gives the same
    choice. Raises :class:`NoChoice`, naming why each was dropped, where none is left; :class:`UsageError` for a policy there is
    none of or a mixture of bundles or targets.
    """
    if policy not in POLICIES:
        raise UsageError(f"got the policy {policy!r}, expected one of {', '.join(POLICIES)}")
    gates = gates or Gates()
    places = {(s.target, s.bundle) for s in summaries}
    if len(places) != 1:
        raise UsageError(f"a choice is between variants of one bundle on one target, got {len(places)} of them")
    admission = admit(summaries, gates)
    ranked = sorted(
        (s for s in admission.admitted if policy != "most-accurate" or s.top1 is not None), key=lambda s: _rank(s, policy)
    )
    first = summaries[0]
    if not ranked:
        raise _no_choice(first, policy, admission)
    best = ranked[0]
    return Choice(
        target=first.target,
        bundle=first.bundle,
        bundle_name=best.bundle_name,
        policy=policy,
        max_loss=gates.max_loss,
        anyway=gates.anyway,
        variant=variant_of(best),
        reason=_figure(best, policy),
        runs=tuple(sorted({s.run_id for s in summaries})),
        behind=tuple(Dropped(variant_of(s), _figure(s, policy)) for s in ranked[1:]),
        dropped=admission.dropped,
        not_held=admission.not_held,
        not_measured=tuple(sorted(not_measured, key=name_variant)),
    )


def admit(summaries: Sequence[Summary], gates: Gates) -> Admission:
    """Hold every gate against every variant."""
    ordered = sorted(summaries, key=lambda s: name_variant(variant_of(s)))
    dropped: list[Dropped] = []
    admitted: list[Summary] = []
    floats = [s for s in ordered if s.scheme in FLOAT_SCHEMES and not _wrong(s)]
    scored = _scored(floats, None)

    def loses(s: Summary) -> str:
        return _loses(s, _scored(floats, s) or scored, gates.max_loss)

    sound = (s for s in floats if _usable(s, gates) and not loses(s))
    timed = min(sound, key=lambda s: s.p50_ms or 0.0, default=None)
    for s in ordered:
        reason = _wrong(s) or _not_valid(s, gates) or loses(s) or _slower(s, floats, timed)
        if reason:
            dropped.append(Dropped(variant_of(s), reason))
        else:
            admitted.append(s)
    return Admission(tuple(admitted), tuple(dropped), _not_held(ordered, floats, scored))


def find_evidence(
    runs: Sequence[Run], bundle: str, can_run: Sequence[Variant], versions: Mapping[str, str]
) -> tuple[list[Summary], tuple[Variant, ...]]:
    """The figures to choose by, of one run, and the variants that run on the device and are not among them.

    Figures of one run are interleaved and may be compared; those of different days may not. So of all ``runs`` that one counts
    which measured most of what can run (with whatever threads were asked for), the newest of equals. A figure taken in another
    version of a runtime than the device has now (``versions``, by runtime) is of another program and does not count; nor does
    one of a plan that answers another question: minutes of heat, or a pair of variants.
    """
    best: tuple[int, str, str] = (0, "", "")
    found: list[Summary] = []
    wanted = {(v.artifact, v.runtime, v.provider) for v in can_run}
    for run in runs:
        if not ranks(run.job.plan):
            continue
        here = [s for s in relate(summarize(run)) if s.bundle == bundle and (s.artifact, s.runtime, s.provider) in wanted]
        here = [s for s in here if s.bundle_name]  # without one it was asked for and never reached
        here = [s for s in here if s.runtime_version in ("", versions.get(s.runtime))]
        rank = (len(here), run.started_at, run.job.run_id)
        if here and rank > best:
            best, found = rank, here
    measured = {variant_of(s) for s in found}
    return found, tuple(v for v in can_run if v not in measured)


def _wrong(s: Summary) -> str:
    """Why the variant must not run at all."""
    if s.failure:
        return s.failure
    return f"other outputs than recorded: {s.mismatch}" if s.mismatch else ""


def _usable(s: Summary, gates: Gates) -> bool:
    return s.p50_ms is not None and (s.verdict.valid or gates.anyway)


def _not_valid(s: Summary, gates: Gates) -> str:
    if s.p50_ms is None:
        return s.p50_absent or "nothing was timed"
    return "" if _usable(s, gates) else f"INVALID: {'; '.join(s.verdict.reasons)}"


def _scored(floats: Sequence[Summary], beside: Summary | None) -> Summary | None:
    """The float whose top-1 others are held against, of those scored on the images of ``beside`` where one is named."""
    known = (s for s in floats if s.top1 is not None and (beside is None or _same_images(s, beside)))
    return max(known, key=lambda s: (s.scheme == "fp32", s.top1 or 0.0), default=None)


def _same_images(a: Summary, b: Summary) -> bool:
    return (a.evaluation, a.labels) == (b.evaluation, b.labels)


def _loses(s: Summary, scored: Summary | None, max_loss: float) -> str:
    if scored is None or scored.top1 is None:
        return ""
    if s.top1 is None:
        return f"its top-1 was not counted: {s.top1_absent}"
    if not _same_images(s, scored):
        return f"its top-1 was counted on other images ({s.evaluation}) than any float's ({scored.evaluation})"
    loss = 100.0 * (scored.top1 - s.top1)
    if loss <= max_loss + 1e-9:
        return ""
    return (
        f"loses {loss:.2f} points of top-1 against {scored.artifact} ({100 * s.top1:.2f} % of {100 * scored.top1:.2f} %, "
        f"{s.images:,} images), at most {max_loss:g} are allowed"
    )


def _slower(s: Summary, floats: Sequence[Summary], timed: Summary | None) -> str:
    if not s.scheme.startswith("int8") or not floats or s.p50_ms is None:
        return ""
    if timed is None or timed.p50_ms is None:
        return "no float variant has a VALID figure that would show int8 to be no slower here"
    if s.p50_ms <= timed.p50_ms:
        return ""
    close = "; the intervals overlap" if _overlap(s, timed) else ""
    return f"int8 slower than float here: {_time(s)} against {_time(timed)} of {name_variant(variant_of(timed))}{close}"


def _overlap(a: Summary, b: Summary) -> bool:
    if a.p50_interval_ms is None or b.p50_interval_ms is None:
        return True
    return a.p50_interval_ms[0] <= b.p50_interval_ms[1] and b.p50_interval_ms[0] <= a.p50_interval_ms[1]


def _not_held(ordered: Sequence[Summary], floats: Sequence[Summary], scored: Summary | None) -> tuple[str, ...]:
    found = []
    if not floats:
        found.append("no float variant was measured: neither loss of accuracy nor int8 slower than float could be told")
    elif scored is None:
        why = next((s.top1_absent for s in ordered if s.top1_absent), "nothing was scored")
        found.append(f"loss of accuracy could not be told: {why}")
    elif scored.images < FEW_IMAGES:
        found.append(f"top-1 was counted on {scored.images} images: one of them is {100 / scored.images:.1f} points")
    return tuple(found)


def _rank(s: Summary, policy: str) -> tuple[float | str, ...]:
    time, size = s.p50_ms or 0.0, s.file_mb or 0.0
    leading: tuple[float, ...] = {
        "fastest": (time, size),
        "smallest": (size, time),
        "most-accurate": (-(s.top1 or 0.0), time, size),
    }[policy]
    return (*leading, s.artifact, s.runtime, s.provider, s.threads)


def _figure(s: Summary, policy: str) -> str:
    if policy == "smallest":
        return f"{s.file_mb or 0.0:.2f} MB, {_time(s)}"
    if policy == "most-accurate":
        return f"top-1 {100 * (s.top1 or 0.0):.2f} % of {s.images:,} images, {_time(s)}"
    return _time(s)


def _time(s: Summary) -> str:
    span = f" ({show_ms(s.p50_interval_ms[0])}–{show_ms(s.p50_interval_ms[1])})" if s.p50_interval_ms else ""
    return f"{show_ms(s.p50_ms or 0.0)}{span} ms"


def show_ms(value: float) -> str:
    """Milliseconds with three significant digits at least, down to a microsecond."""
    return f"{value:,.{4 if value < 0.1 else 3 if value < 1 else 2 if value < 100 else 1}f}"


def _no_choice(first: Summary, policy: str, admission: Admission) -> NoChoice:
    name = first.bundle_name or "the bundle"
    if admission.admitted:
        why = next((s.top1_absent for s in admission.admitted if s.top1_absent), "nothing was scored")
        return NoChoice(
            f"{first.target}: no variant of {name} has a top-1 to choose by: {why}", hint="edgevit build … --eval DATA"
        )
    reasons = "".join(f"\n  {name_variant(d.variant)}: {d.reason}" for d in admission.dropped)
    again = f"edgevit bench BUNDLE {first.target} --variants"
    invalid = any(d.reason.startswith("INVALID") for d in admission.dropped)
    return NoChoice(
        f"{first.target}: no variant of {name} may be chosen as {policy}:{reasons}",
        hint=f"leave the board alone, then: {again} (or take INVALID figures for what they are: --anyway)"
        if invalid
        else again,
    )
