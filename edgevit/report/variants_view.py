"""The variants of one bundle on one device, measured beside each other: figures, what each policy would choose, and why others
were dropped. Within 100 columns. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY, SUPERSCRIPT, Footnotes, order, verdict_notes, verdict_word
from edgevit.select import POLICIES, show_ms, variant_of
from edgevit.variants import name_variant

if TYPE_CHECKING:
    from edgevit.results.store import StoredChoice
    from edgevit.results.summary import Summary
    from edgevit.select import Admission, Choice


def render_variants(
    summaries: Sequence[Summary], admission: Admission, choices: Sequence[Choice], not_chosen: Sequence[tuple[str, str]]
) -> RenderableType:
    """The table of one bundle on one target, one line a policy (``not_chosen``: policy and why it has none), the footnotes."""
    rows, notes = order(summaries), Footnotes()
    dropped = {d.variant: d.reason for d in admission.dropped}
    chosen = {choice.variant for choice in choices}
    first = rows[0]
    table = Table(
        box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0), title_justify="left",
        title=Text(f"{first.bundle_name or first.bundle[:12]} on {first.target}"),
    )  # fmt: skip
    table.add_column("artifact", overflow="fold", min_width=12)
    table.add_column("runs in", overflow="fold", min_width=8)
    for title in ("p50\nms", "95 %", "×\nfp32", "MB", "peak\nMB", "top-1\n%", "agrees\n%"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    usual = {"onnxruntime": "CPUExecutionProvider", "litert": "XNNPACK", "tflite-runtime": "XNNPACK"}
    for s in rows:
        variant = variant_of(s)
        provider = "" if s.provider == usual.get(s.runtime) else f" {s.provider.removesuffix('ExecutionProvider')}"
        span = s.p50_interval_ms
        cells = [
            Text(s.artifact, style="bold" if variant in chosen else ""),
            Text(f"{s.runtime}{provider} ×{s.threads}"),
            _cell(None if s.p50_ms is None else show_ms(s.p50_ms)),
            _cell(f"{show_ms(span[0])}–{show_ms(span[1])}" if span else None),
            _cell(None if s.speedup is None else f"{s.speedup:.2f}"),
            _cell(None if s.file_mb is None else f"{s.file_mb:.1f}"),
            _cell(None if s.peak_mb is None else f"{s.peak_mb:.0f}"),
            _cell(None if s.top1 is None else f"{100 * s.top1:.2f}"),
            _cell(None if s.agreement is None else f"{100 * s.agreement:.1f}"),
        ]
        table.add_row(*cells, _verdict(s, dropped.get(variant, ""), notes))
    lines = [Text(line, style="dim") for line in _legend(rows)]
    lines += [Text(f"{str(i).translate(SUPERSCRIPT)} {text}") for i, text in enumerate(notes.texts, 1)]
    lines += [Text(f"not held: {reason}", style="yellow") for reason in admission.not_held]
    return Group(table, *lines, Text(), _policies(choices, not_chosen))


def _verdict(s: Summary, dropped: str, notes: Footnotes) -> Text:
    word = verdict_word(s)
    if dropped:
        return Text((word if word != "VALID" else "dropped") + notes.mark(dropped), style="red")
    marks = ",".join(notes.mark(note) for note in verdict_notes(s))
    return Text(word + marks, style="green" if word == "VALID" else "red")


def _legend(rows: Sequence[Summary]) -> list[str]:
    said = ["×n: threads; 95 %: where the median of a typical process lies"]
    references = sorted({s.reference for s in rows if s.reference})
    if references:
        said.append(f"× fp32: p50 of {' or '.join(references)} ÷ p50, at the same thread count; agrees: the same class as it")
    return said


def _policies(choices: Sequence[Choice], not_chosen: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for policy in POLICIES:
        choice = next((c for c in choices if c.policy == policy), None)
        if choice is not None:
            table.add_row(policy, name_variant(choice.variant), choice.reason)
        for name, why in not_chosen:
            if name == policy:
                table.add_row(policy, EMPTY, why)
    return table


def render_choices(stored: Sequence[StoredChoice]) -> Table:
    """One line a choice, as they come."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("choice", no_wrap=True)  # it is typed to see one in full
    for title in ("target", "bundle", "policy", "variant", "by"):
        table.add_column(title, overflow="fold")
    for one in stored:
        c = one.choice
        table.add_row(one.id, c.target, c.bundle_name, c.policy, name_variant(c.variant), c.reason)
    return table


def render_choice(stored: StoredChoice) -> RenderableType:
    """A choice in full: what was chosen, from which runs, and what became of every other variant."""
    c = stored.choice
    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("chosen", f"{name_variant(c.variant)}, {c.policy}: {c.reason}")
    facts.add_row("for", f"{c.target}, {stored.created_at}")
    facts.add_row("bundle", f"{c.bundle_name}  {c.bundle}")
    facts.add_row("evidence", ", ".join(c.runs))
    facts.add_row("gates", f"at most {c.max_loss:g} points of top-1 lost" + (", INVALID figures count" if c.anyway else ""))
    for reason in c.not_held:
        facts.add_row("not held", reason)
    for title, others in (("behind", c.behind), ("dropped", c.dropped)):
        for other in others:
            facts.add_row(title, f"{name_variant(other.variant)}: {other.reason}")
    for variant in c.not_measured:
        facts.add_row("not measured", name_variant(variant))
    return facts


def _cell(shown: str | None) -> Text:
    return Text(EMPTY, style="dim") if shown is None else Text(shown)
