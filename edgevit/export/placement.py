"""What of a file runs where, as the runtime installed here really partitioned it: provider, precision, and memory.

Looked up after one real inference, not read off the file: runtimes fuse, split and fall back without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_agents.wire import Placement
from edgevit.errors import BuildError

if TYPE_CHECKING:
    from edgevit.profile import Profile


@dataclass(frozen=True)
class Product:
    """One operator that multiplies matrices or convolves: its kind, its multiply-adds, and the bits of the integers that it
    multiplies (32: it computes in float)."""

    kind: str
    macs: int
    bits: int


@dataclass(frozen=True)
class Use:
    """One node as memory sees it: the tensors it reads and those it makes, with their sizes in bytes. ``view``: its output is
    its first input under another shape, and takes no memory of its own."""

    reads: tuple[str, ...]
    makes: Mapping[str, int]
    view: bool = False


def measure_placement(format_: str, model: bytes) -> Placement:
    """Run ``model`` once in this machine's runtime on zeros and see what it made of it. Raises :class:`ExportError` where the
    runtime refuses the file, :class:`MissingExtra` where there is none."""
    if format_ in ("onnx", "ort"):
        from edgevit.export.placement_onnx import onnx_placement

        return onnx_placement(model)
    from edgevit.export.placement_tflite import tflite_placement

    return tflite_placement(model)


def share_of(products: Sequence[Product], bits: int) -> float:
    """The share of all multiply-adds that operators of integers of ``bits`` do."""
    total = sum(p.macs for p in products)
    return sum(p.macs for p in products if p.bits == bits) / total if total else 0.0


def counted(kinds: Iterable[str]) -> dict[str, int]:
    """How often each kind occurs, the most frequent first."""
    from collections import Counter

    return dict(sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0])))


def peak_bytes(uses: Sequence[Use], inputs: Mapping[str, int], outputs: Sequence[str]) -> int:
    """The most bytes of tensors alive at once, nodes running in the order given: each from the node that makes it to the last
    that reads it. Constants are not counted. No packing, alignment or scratch: a lower bound, to be called an estimate."""
    root: dict[str, str] = {}

    def rooted(name: str) -> str:
        while name in root:
            name = root[name]
        return name

    sizes = dict(inputs)
    for use in uses:
        for name, size in use.makes.items():
            if use.view and use.reads and rooted(use.reads[0]) in sizes:
                root[name] = rooted(use.reads[0])
            else:
                sizes[name] = size
    last = dict.fromkeys(inputs, -1)
    for i, use in enumerate(uses):
        last.update({rooted(name): i for name in (*use.reads, *use.makes)})
    last.update({rooted(name): len(uses) for name in outputs})
    made = {rooted(name): i for i, use in reversed(list(enumerate(uses))) for name in use.makes}
    ending: dict[int, list[str]] = {}
    for name, i in last.items():
        ending.setdefault(i, []).append(name)
    alive = sum(inputs.values())
    peak = alive
    for i, use in enumerate(uses):
        alive += sum(sizes[name] for name in use.makes if rooted(name) == name and made[name] == i)
        peak = max(peak, alive)
        alive -= sum(sizes.get(name, 0) for name in ending.get(i, ()))
    return peak


def verify_memory(name: str, file_bytes: int, placement: Placement, profiles: Sequence[Profile]) -> tuple[str, ...]:
    """Notes on boards that come with too little memory; :class:`BuildError` where no board of a profile has enough for the file
    and the activations."""
    notes = []
    needed = (file_bytes + placement.activation_bytes) / 1e6
    text = f"needs about {needed:,.0f} MB (a file of {file_bytes / 1e6:,.0f} MB, activations of {_activations(placement)} MB)"
    for profile in profiles:
        if profile.memory_mb is None:
            continue
        sizes = profile.memory_mb.value
        if needed > max(sizes):
            raise BuildError(
                f"{name} {text}; the largest {profile.title} has {max(sizes):,} MB",
                hint="a smaller model, a recipe such as int8-dynamic or prune, or leave the profile out",
            )
        if needed > min(sizes):
            small = " and ".join(f"{s:,}" for s in sorted(sizes) if needed > s)
            notes.append(f"not for every {profile.title}: it {text}, and some have {small} MB")
    return tuple(notes)


def _activations(placement: Placement) -> str:
    return f"{placement.activation_bytes / 1e6:,.1f}"
