"""What a search found, as people read it: the answer first, then the front, then how good the predictions are. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY, SUPERSCRIPT, Footnotes
from edgevit.tune.answer import Answer, Rated
from edgevit.tune.latency import LatencyTable
from edgevit.tune.limits import NAMES, Limits

CHOSEN = "★"


def render_answers(answers: Sequence[Answer], limits: Limits, ended: str) -> RenderableType:
    """All targets, each with its answer; within 100 columns."""
    parts: list[RenderableType] = []
    notes = Footnotes()
    for one in answers:
        parts += [
            *_answer_lines(one),
            _front(one, notes),
            *(Text(line, style="dim") for line in table_lines(one.table)),
            Text(),
        ]
    parts.append(Text(f"limits: {limits_text(limits)}; the search ended: {ended}", style="dim"))
    parts.append(Text("loss: points of top-1 to fp32 over the same images; × fp32: of p50, in the same job", style="dim"))
    parts += [Text(f"{str(i).translate(SUPERSCRIPT)} {text}") for i, text in enumerate(notes.texts, 1)]
    return Group(*parts)


def limits_text(limits: Limits) -> str:
    """``loss ≤ 0.5 points, size ≤ 4 MB``."""
    given = [(word, unit, getattr(limits, name)) for name, (word, unit) in NAMES.items() if getattr(limits, name) is not None]
    return ", ".join(f"{word} ≤ {value:g} {unit}" for word, unit, value in given)


def one_line(rated: Rated) -> str:
    """A candidate with what it comes to."""
    c, f = rated.candidate, rated.figures
    text = f"{c.label}, {c.format}"
    if f is not None and f.p50_ms is not None:
        span = f" ({f.interval_ms[0]:.2f}–{f.interval_ms[1]:.2f})" if f.interval_ms else ""
        text += f": p50 {f.p50_ms:.2f}{span} ms, {1 / (f.ratio or 1):.2f} × fp32"
    loss = c.loss if f is None or f.loss is None else f.loss
    return f"{text}, loses {loss:.2f} points, {c.size_mb:.2f} MB"


def _answer_lines(a: Answer) -> list[Text]:
    lines = []
    if a.winner is not None:
        f = a.winner.figures
        lines.append(Text.assemble((f"{a.target}: ", "bold"), (one_line(a.winner), "bold green")))
        if f is not None:
            lost = "" if f.lost is None else f"; of the images fp32 gets right it loses {f.lost}, and gains {f.gained}"
            lines.append(
                Text(f"  evidence: runs {', '.join(f.runs)}; {f.runtime}, threads: {a.winner.candidate.threads}{lost}")
            )
            if f.loss is None:
                lines.append(
                    Text("  its top-1 was not counted there: the loss is that of the file on this machine", style="yellow")
                )
    elif a.nearest is None:
        lines.append(Text.assemble((f"{a.target}: ", "bold"), ("nothing was found", "bold red")))
    else:
        word = "no winner yet" if a.dead else "nothing meets the limits"
        lines.append(Text.assemble((f"{a.target}: ", "bold"), (word, "bold red")))
        lines.append(Text(f"  nearest: {one_line(a.nearest)}"))
        lines += [Text(f"  it misses: {text}") for text in a.nearest.misses]
        if a.unbuilt is not None:
            lines.append(Text(f"  smaller, but not built: {a.unbuilt.label}, {a.unbuilt.format}: {a.unbuilt.reason}"))
    if a.dead:
        lines.append(Text(f"  {a.target} did not see the search to its end: {a.dead}", style="red"))
    said = ", ".join(f"{count} {word}" for word, count in sorted(a.counts.items(), key=lambda pair: -pair[1]))
    lines.append(Text(f"  {sum(a.counts.values())} candidates: {said}", style="dim"))
    return lines


def _front(a: Answer, notes: Footnotes) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("candidate", overflow="fold", min_width=20, max_width=36)
    table.add_column("format")
    for title in ("thr", "p50\nms", "×\nfp32", "p90\nms", "loss\npoints", "file\nMB", "peak\nMB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    shown = list(a.front)
    if a.baseline.candidate.number not in [s.candidate.number for s in shown]:
        shown.append(a.baseline)
    chosen = None if a.winner is None else a.winner.candidate.number
    for s in shown:
        c, f = s.candidate, s.figures
        star = Text(CHOSEN if c.number == chosen else "", style="green")
        if f is None or f.p50_ms is None:
            why = "not measured" if f is None else f.failure or f.doubt
            table.add_row(star, c.label, c.format, str(c.threads), *[EMPTY] * 3, *_sizes(s), EMPTY + notes.mark(why))
            continue
        verdict = "VALID" if f.valid else "INVALID"
        mark = notes.mark("; ".join(f.warnings)) if f.warnings else ""
        table.add_row(
            star, c.label, c.format, str(c.threads), f"{f.p50_ms:.2f}", f"{1 / (f.ratio or 1):.2f}",
            EMPTY if f.p90_ms is None else f"{f.p90_ms:.2f}", *_sizes(s), verdict + mark,
        )  # fmt: skip
    return table


def _sizes(s: Rated) -> tuple[str, str, str]:
    f = s.figures
    loss = s.candidate.loss if f is None or f.loss is None else f.loss
    peak = EMPTY if f is None or f.memory_mb is None else f"{f.memory_mb:.0f}"
    return f"{loss:.2f}", f"{s.candidate.size_mb:.2f}", peak


def table_lines(table: LatencyTable) -> list[str]:
    """How far predictions of latency can be trusted."""
    if not table.held_out or table.error is None:
        return ["latency table: too little was measured to say how wrong its predictions are; nothing was dropped by one"]
    return [
        f"latency table: {len(table.lines)} kinds of file, median error {100 * table.error:.1f} % over {table.held_out} "
        "held-out predictions"
    ]
