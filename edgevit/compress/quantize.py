"""The quantize step: which layers get which integers, decided on the module that is exported.

Linear layers (and convolutions for ``int8-static``) become int8; softmax, normalisation, GELU and the products of two
activations stay float: the fused integer softmax of ONNX Runtime is wrong near uniform attention, and neither pays off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from device_agents.wire import StepReport
from edgevit.compress import Compressed, StepContext, step
from edgevit.compress.config import StepConfig
from edgevit.quantspec import Kind, QuantSpec

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed"]


class Budget(BaseModel):
    """``budget:`` of the scheme ``mixed``: exactly one limit, within which the layers lose as little as possible."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    effective_bits: float | None = Field(default=None, gt=0, le=32, description="most bits for a weight, scales counted in")
    megabytes: float | None = Field(default=None, gt=0, description="most megabytes of weights, what stays float counted in")
    loss: float | None = Field(
        default=None, ge=0, le=100, description="most top-1 agreement with the float model to lose on calibration images, %"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"got {len(given)} limits ({', '.join(given) or 'none'}), expected one of effective_bits, megabytes, loss"
            )
        return self


_INT8 = ("int8-dynamic", "int8-static")
_SCHEMES_OF = {
    "images": (*_INT8, "int4-weights", "mixed"),
    "ranges": ("int8-static",),
    "first": _INT8,
    "rounding": _INT8,
    "smooth": _INT8,
    "row_share": _INT8,
    "group": ("int4-weights", "mixed"),
    "int8_share": ("int4-weights",),
}
"""Setting → the schemes that look at it: in any other it would do nothing, and nobody would hear of it."""


class QuantizeConfig(StepConfig):
    """``quantize:`` of a recipe."""

    images: int = Field(default=128, ge=16, le=4096, description="calibration images, where the scheme looks at any")
    scheme: Precision = Field(description="what weights and activations become")
    ranges: Literal["minmax", "error"] = Field(
        default="error",
        description="int8-static: activation ranges are what was seen, or that shrunk to the least error behind the layer",
    )
    first: Literal["float", "int8"] = Field(
        default="float", description="int8: what becomes of the layer that reads the image, or patches of it"
    )
    rounding: Literal["hessian", "nearest"] = Field(
        default="hessian",
        description="int8: weights of linear layers rounded against their inputs where there are images (GPTQ), or to nearest",
    )
    smooth: bool = Field(
        default=True, description="int8: move outliers of activations into weights, exactly, where there are images"
    )
    row_share: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="int8: the share of linear layers, those measured to gain most, whose activations have a range for each "
        "row, taken at run time, where there are images; costs up to 6 % of the speed; null: 0.1 for ONNX, 0.25 for TFLite",
    )
    group: Literal[16, 32, 64, 128] | None = Field(
        default=32, description="int4 weights: how many inputs share one scale and zero point; null: all of an output channel's"
    )
    int8_share: float = Field(
        default=0.0,
        ge=0,
        le=0.9,
        description="int4-weights: the share of the weights that keeps int8, in the layers measured to suffer most from int4",
    )
    budget: Budget | None = Field(default=None, description="mixed: what the layers' widths together must keep")

    @property
    def needs_images(self) -> bool:
        return self.scheme in ("int8-static", "int4-weights", "mixed")

    @property
    def uses_images(self) -> bool:
        return self.needs_images or self.scheme == "int8-dynamic"

    @model_validator(mode="after")
    def _settings_are_of_the_scheme(self) -> QuantizeConfig:
        fields = type(self).model_fields
        changed = [n for n in _SCHEMES_OF if getattr(self, n) != fields[n].default]
        idle = [n for n in changed if self.scheme not in _SCHEMES_OF[n]]
        if idle:
            raise ValueError(f"scheme {self.scheme} does not look at {', '.join(idle)}: leave it out")
        return self

    @model_validator(mode="after")
    def _budget_is_for_mixed(self) -> QuantizeConfig:
        if (self.scheme == "mixed") != (self.budget is not None):
            raise ValueError(f"scheme {self.scheme} {'needs a budget' if self.budget is None else 'takes no budget'}")
        return self


@step(QuantizeConfig)
def quantize(state: Compressed, config: QuantizeConfig, context: StepContext) -> Compressed:
    """Decide the QuantSpec. Raises :class:`BuildError` where the scheme applies to no layer, :class:`DataError` where it needs
    real images and has none."""
    from dataclasses import replace

    if config.scheme in ("fp32", "fp16"):
        bits = 32 if config.scheme == "fp32" else 16
        spec = QuantSpec(config.scheme, float_bits=bits)
        return replace(state, spec=spec).reported(StepReport("quantize", 0, f"{config.scheme}: every layer stays float", {}))
    if config.scheme in ("int8-weights", "int4-weights", "mixed"):
        from edgevit.compress.mixed import mixed
        from edgevit.compress.weight_only import int4_weights, int8_weights

        chosen = {"int8-weights": int8_weights, "int4-weights": int4_weights, "mixed": mixed}
        return chosen[config.scheme](state, config, context)
    from edgevit.compress.int8 import int8

    return int8(state, config, context)


def quantizable_layers(module: torch.nn.Module, convolutions: bool) -> list[tuple[str, Kind, bool]]:
    """(path, kind, depthwise) of every layer a scheme can turn to integers, in the module's own order."""
    import torch

    found: list[tuple[str, Kind, bool]] = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            found.append((name, "linear", False))
        elif convolutions and isinstance(layer, torch.nn.Conv2d):
            found.append((name, "conv", layer.groups > 1))
    return found


def unfit_layers(module: torch.nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Layers that files do not hold once each, and why: those whose input is the same for ``x`` (N, 3, H, W) and for noise of
    its shape, as in networks that make position biases (Swin V2, GCViT), which exporters fold into a constant, those that run
    several times (CoaT), and linear layers that have no part in the answer (a head for training alone)."""
    import torch

    from edgevit.compress.equalise import run_hooked

    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                seen.setdefault(name, []).append(args[0])

        return see

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    for one in (x, noise):
        run_hooked(module, one, [layer.register_forward_pre_hook(note(name)) for name, layer in layers])
    found = {}
    for name, read in seen.items():
        if _same_halves(read):
            found[name] = "it reads the same for every image, and is computed once, when the file is written"
        elif len(read) > 2:
            found[name] = f"it runs {len(read) // 2} times in one inference"
    silent = [n for n, m in layers if isinstance(m, torch.nn.Linear) and n not in seen]
    return found | dict.fromkeys(_unused(module, x, silent), "it has no part in the answer")


def _unused(module: torch.nn.Module, x: torch.Tensor, names: list[str]) -> list[str]:
    """Those of the layers ``names`` whose weight the outputs for ``x`` do not hang on. A layer that is not called may still be
    multiplied by (BEiT, EVA)."""
    import torch

    weights: list[Any] = [module.get_submodule(name).weight for name in names]
    if not names:
        return []
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            answer = module(x).sum()
        if not answer.requires_grad:
            return names
        slopes = torch.autograd.grad(answer, weights, allow_unused=True)
    finally:
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)
    return [name for name, slope in zip(names, slopes, strict=True) if slope is None]


def _same_halves(read: list[torch.Tensor]) -> bool:
    import torch

    half = len(read) // 2
    return all(torch.equal(a, b) for a, b in zip(read[:half], read[half:], strict=True))
