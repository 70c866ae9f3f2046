"""A bundle as tables for people, within 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from device_agents.wire import check_index
from edgevit.report.table import EMPTY

if TYPE_CHECKING:
    from device_agents.wire import Artifact, BeforeAfter, Manifest, StepReport
    from edgevit.bundle import Bundle


def render_bundle(bundle: Bundle) -> RenderableType:
    """Name, version, where it lies, and one line an artifact with how far it lies from the PyTorch module."""
    manifest = bundle.manifest
    head = Text.assemble((manifest.name, "bold"), f"  version {manifest.version}  {bundle.path}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("artifact", "MB", "max error", "cosine ≥", "top-1 agrees", "opset", "IR"):
        table.add_column(title, justify="left" if title == "artifact" else "right")
    for artifact in manifest.artifacts:
        parity = artifact.parity
        table.add_row(
            artifact.name,
            f"{artifact.blob.size / 1e6:.2f}",
            f"{parity.max_abs_error:.2g}",
            f"{parity.min_cosine:.5f}",
            f"{100 * parity.top1_agreement:.1f} % of {parity.images}",
            str(artifact.opset or "–"),
            str(artifact.ir_version or "–"),
        )
    return Group(head, *_compressed(manifest), table, *_warnings(bundle))


def _compressed(manifest: Manifest) -> list[Text]:
    """What structural steps left of the model, in a line; nothing where there were none."""
    measured = [step for step in manifest.steps if step.damage]
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    sizes = []
    for name, before, after in (
        ("parameters", first.parameters, last.parameters),
        ("MACs", first.macs, last.macs),
    ):
        if before and after and before.before:
            sizes.append(f"{100 * (after.after / before.before - 1):+.1f} % {name}")
    agrees = f"top-1 agrees on {100 * last.damage.agreement:.1f} % of {last.damage.images}" if last.damage else ""
    told = ", ".join([*sizes, f"{agrees} {_looked_at(manifest)}"])
    return [Text(f"{' + '.join(step.step for step in measured)}: {told}")]


def _looked_at(manifest: Manifest) -> str:
    """What the damage of steps was measured on."""
    return "synthetic images" if manifest.golden.source == "synthetic" else "calibration images"


def _warnings(bundle: Bundle) -> list[Text]:
    lines = []
    if bundle.manifest.golden.source == "synthetic":
        lines.append(Text("golden inputs are synthetic images: give --eval or --calib for real ones", style="yellow"))
    if bundle.manifest.evaluation is None:
        lines.append(Text(f"no top-1 on the device: {bundle.manifest.evaluation_absent}", style="yellow"))
    for artifact in bundle.manifest.artifacts:
        lines += [Text(f"{artifact.name}: {note}", style="yellow") for note in artifact.notes if note.startswith("not ")]
    lines += [Text(f"{one.artifact} was not made: {one.reason}", style="yellow") for one in bundle.manifest.not_made]
    return lines


def render_explanation(bundle: Bundle, only: str | None) -> RenderableType:
    """Where the model came from, what each step did, and each artifact in full (or the one named ``only``)."""
    m = bundle.manifest
    pre = m.preprocessing
    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    macs = f", {m.model.macs / 1e6:,.0f} M multiply-adds" if m.model.macs else ""
    facts.add_row("model", f"{m.model.name}, {m.model.classes} classes, {m.model.parameters / 1e6:.2f} M parameters{macs}")
    facts.add_row("weights", m.model.weights)
    facts.add_row("model digest", m.model.digest)
    facts.add_row("recipe", f"{m.recipe.name}  {m.recipe.digest[:16]}")
    facts.add_row(
        "preprocessing",
        f"{pre.height} × {pre.width} px, short side to {pre.resize_short} {pre.interpolation}, {pre.crop_mode} crop, "
        f"mean {_triple(pre.mean)}, std {_triple(pre.std)}",
    )
    for name, value in m.model.overrides.items():
        facts.add_row(f"set: {name}", value)
    facts.add_row("golden inputs", f"{m.golden.count} {m.golden.source}")
    evaluation = f"{m.evaluation.name}: {m.evaluation.count} images" if m.evaluation else m.evaluation_absent
    facts.add_row("evaluation", evaluation)
    facts.add_row("chunk index", _chunks(bundle))
    facts.add_row("made by", m.made_by)
    facts.add_row("tools", ", ".join(f"{k} {v}" for k, v in sorted(m.tools.items())))
    parts: list[RenderableType] = [render_bundle(bundle), Text(), facts, Text()]
    parts += _render_steps(m, only)
    for artifact in m.artifacts:
        if only in (None, artifact.name):
            parts += [Text(), _render_artifact(artifact)]
    return Group(*parts)


def _chunks(bundle: Bundle) -> str:
    if bundle.manifest.chunks is None:
        return "none: whole files are sent; build the bundle again to send only what a device lacks of them"
    sizes = {blob.sha256: blob.size for blob in bundle.manifest.blobs()}
    count = sum(len(cut) for cut in check_index(bundle.read_chunk_index(), sizes).values())
    return f"{count:,} chunks; a device is sent those that it holds nowhere"


def steps_of(manifest: Manifest, only: str | None) -> list[StepReport]:
    """All steps, or those that were done for the artifact ``only``."""
    return [step for step in manifest.steps if only is None or not step.artifacts or only in step.artifacts]


def _render_steps(manifest: Manifest, only: str | None) -> list[RenderableType]:
    """What each step did and what it cost, one row a step; for ``only`` one artifact its own, with every layer they touched."""
    steps = steps_of(manifest, only)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("step")
    for title in ("layers", "parameters M", "MACs M", "cosine", "agrees %", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for step in steps:
        damage = step.damage
        table.add_row(
            _step_title(step),
            f"{step.layers:,}",
            _before_after(step.parameters, 2),
            _before_after(step.macs, 1),
            f"{damage.cosine:.4f}" if damage else EMPTY,
            f"{100 * damage.agreement:.1f}" if damage else EMPTY,
            f"{step.seconds:.1f}" if step.seconds is not None else EMPTY,
        )
    parts: list[RenderableType] = [table]
    images = sorted({step.damage.images for step in steps if step.damage})
    if images:
        counted = " or ".join(f"{n:,}" for n in images)
        told = f"cosine, agrees: with the original model after this step, on {counted} {_looked_at(manifest)}"
        parts.append(Text(told, style="dim"))
    for step in steps:
        parts.append(Text.assemble((f"step {_step_title(step)}", "bold"), f": {step.summary}"))
        if only is not None and step.details:
            layers = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
            layers.add_column(overflow="fold", max_width=40)
            layers.add_column(overflow="fold")
            for layer, what in step.details.items():
                layers.add_row(Text(layer), Text(what))
            parts.append(Padding(layers, (0, 0, 0, 2)))
    return parts


def _step_title(step: StepReport) -> str:
    """The step, and for which artifacts it was done where that is not all of them."""
    return f"{step.step} ({', '.join(step.artifacts)})" if step.artifacts else step.step


def _before_after(count: BeforeAfter | None, digits: int) -> str:
    """Millions before and after; one figure where nothing changed."""
    if count is None:
        return EMPTY
    before, after = f"{count.before / 1e6:,.{digits}f}", f"{count.after / 1e6:,.{digits}f}"
    if count.before == count.after:
        return before
    return f"{before} → {after} ({100 * (count.after / count.before - 1):+.1f} %)" if count.before else f"{before} → {after}"


def _render_artifact(artifact: Artifact) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0), title=artifact.name, title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    shape = "×".join(str(d) for d in artifact.input.shape)
    table.add_row(
        "file", f"{artifact.format} {artifact.scheme}, {artifact.blob.size:,} bytes, sha256 {artifact.blob.sha256[:16]}"
    )
    table.add_row("input", f"{artifact.input.name}: {artifact.input.dtype} {shape} {artifact.input.layout}")
    table.add_row("fits", ", ".join(artifact.fits))
    tolerance = artifact.golden.tolerance
    relative = (
        f"largest difference ≤ {tolerance.max_relative:g} of the largest output, " if tolerance.max_relative is not None else ""
    )
    table.add_row(
        "golden check",
        f"{relative}cosine ≥ {tolerance.min_cosine:g}, same top-1 where the margin exceeds {tolerance.top1_margin:.3g}; "
        f"recorded with {artifact.golden.runtime} {artifact.golden.runtime_version}",
    )
    for checked in artifact.checked:
        table.add_row(
            "ran in",
            f"{checked.runtime} {checked.version} (Python {checked.python}): max error {checked.max_abs_error:.2g}, "
            f"cosine ≥ {checked.min_cosine:.5f}",
        )
    for title, text in _placed(artifact):
        table.add_row(title, text)
    for note in artifact.notes:
        table.add_row("note", note)
    operators = sorted(artifact.operators.items(), key=lambda item: (-item[1], item[0]))
    table.add_row("operators", ", ".join(f"{name} {count}" for name, count in operators))
    return table


def _placed(artifact: Artifact) -> list[tuple[str, str]]:
    """What of an artifact runs where; nothing for one built before that was looked at."""
    p = artifact.placement
    if p is None:
        return []
    shares = [f"{100 * share:.1f} % in {name}" for name, share in (("int8", p.int8_share), ("int4", p.int4_share)) if share]
    floats = _counts(p.float_operators)
    lines = [
        ("multiply-adds", f"{p.macs / 1e6:,.1f} M: {', '.join(shares) or 'all in float'}"),
        ("computed in float", f"{floats} (of what multiplies)" if floats else "nothing that multiplies"),
    ]
    nodes = ", ".join(f"{count:,} by {name}" for name, count in p.nodes.items())
    pieces = f", in {p.partitions:,} pieces" if p.partitions > 1 else ""
    lines.append(("nodes", f"{nodes}{pieces}, in {p.runtime} {p.runtime_version}"))
    if p.outside:
        lines.append(("not delegated", _counts(p.outside)))
    if p.leftover_pairs:
        lines.append(
            ("left over", f"{p.leftover_pairs:,} pairs of QuantizeLinear and DequantizeLinear that no operator took in")
        )
    needed = artifact.blob.size + p.activation_bytes
    lines.append(
        ("memory, estimate", f"{needed / 1e6:,.2f} MB: the file, and {p.activation_bytes / 1e6:,.2f} MB of activations at most")
    )
    return lines


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in kinds.items())


def _triple(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:g}" for v in values)
