"""Running the structural steps of a recipe: each is measured, and what it left is kept, so that two recipes that begin alike
(a study's rows, a recovery of half an hour) do the common part once, and an interrupted one goes on where it stood."""

from __future__ import annotations

import ast
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents import wire
from edgevit.cache import Cache, Entry, digest_of, hash_file, tool_versions
from edgevit.compress import KINDS, CalibrationData, Compressed, StepContext, Structure, TrainingData, apply_step, restructure
from edgevit.errors import BuildError
from edgevit.macs import count_macs
from edgevit.progress import Progress
from edgevit.quantspec import QuantSpec

if TYPE_CHECKING:
    import torch

    from edgevit.recipe import StepEntry

DAMAGE_IMAGES = 64
_COMMON = ("__init__.py", "walk.py")


@dataclass(frozen=True)
class StepData:
    """What the steps of one build look at, and the digests of it; ``training`` prepares its images when first asked."""

    calibration: CalibrationData
    training: Callable[[], TrainingData]
    multiple: int
    digest: str
    training_digest: str


def run_steps(
    start: Compressed, identity: str, steps: Sequence[StepEntry], data: StepData, cache: Cache, on_progress: Progress
) -> Compressed:
    """Carry out ``steps`` on the model ``identity`` stands for, from the longest beginning that was carried out before.

    Raises :class:`BuildError` where a step changed nothing or left NaN or infinity behind.
    """
    keys = [_key(identity, steps[: i + 1], data) for i in range(len(steps))]
    state, done = start, 0
    for i in reversed(range(len(steps))):
        entry = cache.get(keys[i])
        if entry is not None:
            state, done = _restore(start, entry), i + 1
            on_progress.start(keys[i], f"{steps[i].kind}: carried out before")
            on_progress.finish(
                keys[i],
                f"{steps[i].kind}: taken from the cache, with the {i} steps before it"
                if i
                else f"{steps[i].kind}: taken from the cache",
            )
            break
    reference = None
    for i in range(done, len(steps)):
        if reference is None:
            reference = _outputs(start.original, start, data.calibration)
        scratch = cache.root / "unfinished" / keys[i]
        context = StepContext(data.calibration, data.training, data.multiple, scratch, on_progress)
        state = _measured(state, steps[i], context, reference)
        _keep(cache, keys[i], state)
        _discard(scratch)
    return state


def _key(identity: str, steps: Sequence[StepEntry], data: StepData) -> str:
    here = Path(__file__).parent
    files = sorted({f"{name}.py" for s in steps for name in sources_of(KINDS[s.kind].rpartition(".")[2])} | set(_COMMON))
    return digest_of(
        "steps",
        identity,
        [[s.kind, s.config.model_dump(mode="json")] for s in steps],
        [data.digest, data.multiple, data.training_digest if any(s.config.trains for s in steps) else ""],
        [hash_file(here / f) for f in files],
        {k: v for k, v in tool_versions().items() if k in ("torch", "timm", "numpy", "torch-pruning")},
    )


@lru_cache(maxsize=64)
def sources_of(name: str) -> frozenset[str]:
    """Modules of ``edgevit.compress`` that decide what the module ``name`` of it does: itself and what it imports, wherever in
    the file, and so on. An edited one carries its steps out anew."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        tree = ast.parse((Path(__file__).parent / f"{one}.py").read_text(encoding="utf-8"))
        modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        waiting += [m.rpartition(".")[2] for m in modules if m.startswith("edgevit.compress.")]
    return frozenset(found)


def _measured(state: Compressed, step: StepEntry, context: StepContext, reference: Any) -> Compressed:
    """One step, with parameters, MACs and damage written into its report."""
    began = time.monotonic()
    before = size_of(state.module, state.preprocessing)
    after_step = apply_step(state, step.config, context)
    report = after_step.reports[-1]
    if report.layers == 0:
        raise BuildError(f"{step.kind} touched no layer: {report.summary}", hint="leave the step out, or change its settings")
    _verify_finite(after_step.module, step.kind)
    after_step.module.eval()
    parameters, macs = size_of(after_step.module, state.preprocessing)
    outputs = _outputs(after_step.module, state, context.calibration)
    cosine, agreement = damage(reference, outputs)
    told = replace(
        report,
        parameters=wire.BeforeAfter(before[0], parameters),
        macs=wire.BeforeAfter(before[1], macs),
        damage=wire.Damage(len(reference), cosine, agreement),
        seconds=time.monotonic() - began,
    )
    return replace(after_step, reports=(*after_step.reports[:-1], told))


def size_of(module: torch.nn.Module, preprocessing: wire.Preprocessing) -> tuple[int, int]:
    """(parameters, MACs of one image)."""
    return sum(p.numel() for p in module.parameters()), count_macs(module, preprocessing)


def damage(reference: Any, outputs: Any) -> tuple[float, float]:
    """(mean cosine, share of equal top-1) of two (N, classes) outputs."""
    from edgevit.export.parity import cosines

    return float(cosines(reference, outputs).mean()), float((reference.argmax(1) == outputs.argmax(1)).mean())


def _outputs(module: torch.nn.Module, state: Compressed, calibration: CalibrationData) -> Any:
    from edgevit.export.parity import reference_outputs

    return reference_outputs(module, calibration.pixels[:DAMAGE_IMAGES], state.preprocessing)


def _verify_finite(module: torch.nn.Module, kind: str) -> None:
    import torch

    broken = [n for n, v in module.state_dict().items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise BuildError(
            f"{kind} left NaN or infinity in {', '.join(broken[:5])}", hint="check the weights and the calibration images"
        )


def _keep(cache: Cache, key: str, state: Compressed) -> Entry:
    from safetensors.torch import save

    tensors = {k: v.detach().contiguous().clone() for k, v in state.module.state_dict().items()}
    meta = {
        "structure": [[s.kind, s.plan] for s in state.structure],
        "reports": [wire.encode(r) for r in state.reports],
    }
    return cache.put(key, {"weights": save(tensors)}, meta)


def _restore(start: Compressed, entry: Entry) -> Compressed:
    from safetensors.torch import load_file

    structure = tuple(Structure(kind, plan) for kind, plan in entry.meta["structure"])
    reports = tuple(wire.decode(wire.StepReport, r, "cached step report") for r in entry.meta["reports"])
    module = restructure(copy.deepcopy(start.original), structure)
    module.load_state_dict(load_file(str(entry.files["weights"])), strict=True)
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return replace(start, module=module, structure=structure, reports=reports, spec=QuantSpec("fp32"))


def _discard(scratch: Path) -> None:
    import shutil

    if scratch.is_dir():
        shutil.rmtree(scratch)
