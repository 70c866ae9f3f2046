"""What to ship on each target, by the gates of :mod:`edgevit.select`; or what is missing to say so, and how to get it. Pure.

Figures of one batch are compared with each other, never across batches: of each model and target that batch counts which
measured most variants, the newest of equals. Minutes of heat and pairs of variants answer other questions and count only where
there is nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgevit.plans import PLANS, ranks
from edgevit.results.summary import Summary
from edgevit.select import Admission, Gates, admit, show_ms, variant_of

MODEL_COMMAND = "edgevit build MODEL --weights FILE --recipe fp32 --recipe int8-dynamic --for {target} --eval DATA -o DIR"


@dataclass(frozen=True)
class Answer:
    """``word``: ``ship``; ``missing`` (a gate could not be held, ``best`` is the fastest VALID one so far); ``none`` (nothing
    passed). ``behind`` are those that might be shipped too, by falling speed; ``dropped`` those that must not, with the
    reason. ``commands`` are what to type next."""

    model: str
    target: str
    board: str
    word: str
    best: Summary | None
    why: str
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    behind: tuple[Summary, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    members: tuple[Summary, ...] = field(default=(), repr=False)


def answers(summaries: Sequence[Summary], gates: Gates | None = None) -> list[Answer]:
    """One answer for each model and target, in the order of ``summaries``."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in summaries:
        groups.setdefault((s.model, s.target), []).append(s)
    # What was never reached has no model where its run measured several: its row says so, and no answer is owed.
    named = {target for model, target in groups if model}
    chosen = {key: members for key, members in groups.items() if key[0] or key[1] not in named}
    return [_answer(model, target, _evidence(members), gates or Gates()) for (model, target), members in chosen.items()]


def _evidence(members: Sequence[Summary]) -> list[Summary]:
    ranked = [s for s in members if s.sustained is None and (s.plan not in PLANS or ranks(PLANS[s.plan]))] or list(members)
    batches: dict[str, list[Summary]] = {}
    for s in ranked:
        batches.setdefault(s.batch_id, []).append(s)

    def weight(batch: Sequence[Summary]) -> tuple[int, str]:
        return len({variant_of(s) for s in batch if s.p50_ms is not None}), max(s.started_at for s in batch)

    return max(batches.values(), key=weight)


def _answer(model: str, target: str, members: Sequence[Summary], gates: Gates) -> Answer:
    admission = admit(members, gates)
    ranked = sorted(admission.admitted, key=lambda s: (s.p50_ms or 0.0, s.file_mb or 0.0, s.artifact, s.runtime, s.threads))
    label = {variant_of(s): name_row(s) for s in members}
    dropped = tuple((label[d.variant], d.reason) for d in admission.dropped)
    floats = [s for s in members if s.scheme in ("fp32", "fp16")]
    scored = any(s.top1 is not None for s in floats)
    missing, commands = _missing(target, members, bool(floats), scored)
    best = ranked[0] if ranked else None
    word = "none" if best is None else "missing" if missing else "ship"
    return Answer(
        model=model,
        target=target,
        board=members[0].board,
        word=word,
        best=best,
        why=_why(word, admission, gates, members),
        missing=tuple(missing),
        remarks=tuple(r for r in admission.not_held if floats and scored),
        commands=tuple(commands) if word != "none" else (f"edgevit bench BUNDLE {target} --plan standard",),
        behind=tuple(ranked[1:]),
        dropped=dropped,
        members=tuple(members),
    )


def _missing(target: str, members: Sequence[Summary], floats: bool, scored: bool) -> tuple[list[str], list[str]]:
    """The gates that could not be held, in words, and what to type for them."""
    if not floats:
        return (
            ["no float variant was measured beside it: what int8 costs in accuracy and gains in speed cannot be told"],
            [MODEL_COMMAND.format(target=target), f"edgevit bench DIR/fp32 {target}"],
        )
    if scored:
        return [], []
    why = next((s.top1_absent for s in members if s.top1_absent), "nothing was scored")
    return (
        [f"accuracy was not measured: {why}"],
        [MODEL_COMMAND.format(target=target), f"edgevit bench DIR/int8-dynamic {target}"],
    )


def _why(word: str, admission: Admission, gates: Gates, members: Sequence[Summary]) -> str:
    if word == "ship":
        return f"the fastest VALID variant that loses at most {gates.max_loss:g} point of top-1 against float"
    if word == "missing":
        return "the fastest VALID variant so far; it is no answer yet"
    if not any(s.rankable for s in members):
        return "no measurement is VALID"
    return f"every variant was dropped ({len(admission.dropped)}): the reasons stand below"


def name_row(s: Summary) -> str:
    """A measurement's name among those of its model and target."""
    return f"{s.label} in {s.runtime}, {s.provider}, {s.threads} thread{'' if s.threads == 1 else 's'}"


def figures(a: Answer) -> list[list[str]]:
    """[name, value, how sure] of the best variant, for a card."""
    s = a.best
    if s is None or s.p50_ms is None:
        return []
    span = s.p50_interval_ms
    found = [["p50", f"{show_ms(s.p50_ms)} ms", f"{show_ms(span[0])}–{show_ms(span[1])}, 95 %" if span else ""]]
    if s.speedup is not None and s.scheme != "fp32":
        found.append(["against fp32", f"{s.speedup:.2f} ×", f"of {s.reference}"])
    if s.top1 is not None:
        error = f"± {100 * s.top1_error:.2f}, {s.images:,} images" if s.top1_error is not None else ""
        found.append(["top-1", f"{100 * s.top1:.2f} %", error])
    if s.file_mb is not None:
        found.append(["file", f"{s.file_mb:.{2 if s.file_mb < 10 else 1}f} MB", ""])
    if s.peak_mb is not None:
        found.append(["peak memory", f"{s.peak_mb:.0f} MB", ""])
    if s.energy_mj is not None:
        found.append(["energy", f"{s.energy_mj:.2f} mJ", f"net of idle, {s.energy_scope}"])
    return found


def cards(found: Sequence[Answer]) -> list[dict[str, Any]]:
    """Answers as the page shows them: targets of one kind of board with the same answer share a card."""
    groups: dict[tuple[object, ...], list[Answer]] = {}
    for a in found:
        best = name_row(a.best) if a.best else ""
        groups.setdefault((a.model, a.board, a.word, best, a.missing), []).append(a)
    return [_card(group) for group in groups.values()]


def _card(group: Sequence[Answer]) -> dict[str, Any]:
    middle = sorted(group, key=lambda a: (a.best.p50_ms or 0.0) if a.best else 0.0)[(len(group) - 1) // 2]
    one = len(group) == 1
    return {
        "model": middle.model,
        "board": middle.board,
        "word": middle.word,
        "targets": [a.target for a in group],
        "title": middle.best.label if middle.best else "",
        "where": _where(middle.best),
        "figures": figures(middle),
        "figures_of": "" if one else f"of {middle.target}, the median of {len(group)} targets",
        "why": middle.why,
        "missing": list(middle.missing),
        "remarks": list(middle.remarks),
        "commands": list(middle.commands),
        "behind": [[name_row(s), _figure(s)] for s in middle.behind],
        "dropped": [list(d) for d in middle.dropped],
        "each": [] if one else [[a.target, _figure(a.best) if a.best else ""] for a in group],
    }


def _where(s: Summary | None) -> str:
    if s is None:
        return ""
    return f"{s.runtime} {s.runtime_version}, {s.provider}, {s.threads} thread{'' if s.threads == 1 else 's'}"


def _figure(s: Summary) -> str:
    if s.p50_ms is None:
        return s.p50_absent
    span = s.p50_interval_ms
    told = f"{show_ms(s.p50_ms)} ms" + (f" ({show_ms(span[0])}–{show_ms(span[1])})" if span else "")
    return told + (f", top-1 {100 * s.top1:.2f} %" if s.top1 is not None else "")


def in_words(card: dict[str, Any]) -> str:
    """A card as a sentence: for a reader without scripts, and for tests."""
    where = ", ".join(card["targets"])
    told = ", ".join(f"{name} {value}" for name, value, _ in card["figures"])
    if card["word"] == "ship":
        return f"{where}: ship {card['title']} in {card['where']}: {told} ({card['why']})"
    if card["word"] == "missing":
        return (
            f"{where}: no answer yet: {'; '.join(card['missing'])}. Fastest so far: {card['title']} in {card['where']}: {told}"
        )
    return f"{where}: nothing to ship yet: {card['why']}"
