"""timm names → modules that fit the weights: class count, image size and extra tokens are read off the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgevit.errors import ModelError, UnknownName
from edgevit.model import ModelSource
from edgevit.torchsetup import import_timm, import_torch


def build_timm_module(
    source: ModelSource, state: Mapping[str, Any] | None, overrides: dict[str, str]
) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
    """(module, data config, the state to load strictly or None). What was derived or resampled goes into ``overrides``.

    Raises :class:`UnknownName` with the nearest timm names, :class:`ModelError` for arguments the model does not take, and for
    hub weights that cannot be had.
    """
    timm = import_timm()
    name = _known_name(source.name, state, overrides)
    arguments = dict(source.model_args)
    overrides.update({f"arg {k}": str(v) for k, v in arguments.items()})
    classes = source.num_classes
    tensors = dict(state) if state is not None else None
    if tensors is not None:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        classes = _classes_of(tensors, config, source, overrides)
        if "reg_token" in tensors and "reg_tokens" not in arguments:
            arguments["reg_tokens"] = int(tensors["reg_token"].shape[1])
    if source.pretrained and classes is not None:
        _verify_trained_for(classes, name, source)
    if classes is not None:
        if source.num_classes is not None:
            overrides["num_classes"] = str(classes)
        arguments["num_classes"] = classes
    if source.img_size:
        arguments["img_size"] = source.img_size
    module = _create(name, arguments, source)
    if tensors is not None:
        module, tensors = _match_position(name, module, tensors, arguments, source, overrides)
    config = timm.data.resolve_model_data_config(module)
    size = _image_size(module)
    if size and not source.img_size:
        config["input_size"] = (config["input_size"][0], size, size)
    return module, config, tensors


def _known_name(name: str, state: Mapping[str, Any] | None, overrides: dict[str, str]) -> str:
    timm = import_timm()
    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UnknownName(
            "timm model", base, timm.list_models(), hint="edgevit build package.module:factory for a model of your own"
        )
    distilled = base.replace("deit_", "deit_", 1).replace("_patch", "_distilled_patch", 1)
    if state is not None and "dist_token" in state and "distilled" not in base and timm.is_model(distilled):
        overrides["architecture"] = f"{distilled}, since the weights hold a distillation token"
        return distilled
    return name


def _classes_of(state: Mapping[str, Any], config: Any, source: ModelSource, overrides: dict[str, str]) -> int | None:
    """Rows of the classifier's weight. None where the file names it otherwise: strict loading then says what differs."""
    classifier = getattr(config, "classifier", None) or "head"
    names = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    for name in names:
        weight = state.get(f"{name}.weight", state.get(f"{name}.l.weight"))
        if weight is None:
            continue
        rows = int(weight.shape[0])
        if source.num_classes is not None and source.num_classes != rows:
            raise ModelError(
                f"{source.weights}: {name}.weight has {rows} rows, --num-classes asked for {source.num_classes}",
                hint=f"--num-classes {rows}, or leave it out: the weights say it",
            )
        if rows != getattr(config, "num_classes", rows):
            overrides["num_classes"] = f"{rows}, from the weights"
        return rows
    return source.num_classes


def _verify_trained_for(classes: int, name: str, source: ModelSource) -> None:
    """timm draws a new classifier at random where another number of classes is asked for than the hub's weights have."""
    config = import_timm().get_pretrained_cfg(name, allow_unregistered=True)
    trained = getattr(config, "num_classes", classes)
    if trained != classes:
        raise ModelError(
            f"the pretrained weights of {source.name} tell {trained} classes apart, --num-classes asked for {classes}: their "
            f"classifier would be random",
            hint="leave --num-classes out, or give weights that were trained for your classes with --weights FILE",
        )


def _create(name: str, arguments: Mapping[str, Any], source: ModelSource) -> Any:
    timm = import_timm()
    try:
        return timm.create_model(name, pretrained=source.pretrained, **arguments)
    except TypeError as e:
        raise ModelError(f"{name} does not take {', '.join(f'{k}={v}' for k, v in arguments.items())}: {e}") from e
    except Exception as e:
        said = str(e).strip().split("\n")[0][:300]
        if source.pretrained:
            raise ModelError(
                f"the pretrained weights of {name} could not be had: {type(e).__name__}: {said}",
                hint="check the network, or give a file with --weights FILE",
            ) from e
        raise ModelError(f"timm could not build {name} with {dict(arguments)}: {type(e).__name__}: {said}") from e


def _match_position(
    name: str, module: Any, state: dict[str, Any], arguments: dict[str, Any], source: ModelSource, overrides: dict[str, str]
) -> tuple[Any, dict[str, Any]]:
    """Another position-embedding length in the weights means another image size; a size set by hand resamples the embedding."""
    timm = import_timm()
    there, here = state.get("pos_embed"), getattr(module, "pos_embed", None)
    if there is None or here is None or there.shape == here.shape or there.ndim != 3 or here.ndim != 3:
        return module, state
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    prefix = 0 if getattr(module, "no_embed_class", False) else int(getattr(module, "num_prefix_tokens", 1))
    side = math.isqrt(max(int(there.shape[1]) - prefix, 0))
    if not patch or there.shape[2] != here.shape[2] or side * side != there.shape[1] - prefix:
        return module, state
    if source.img_size:
        grid = tuple(module.patch_embed.grid_size)
        torch = import_torch()
        with torch.no_grad():
            state["pos_embed"] = timm.layers.resample_abs_pos_embed(
                there, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
            )
        overrides["pos_embed"] = f"resampled from {side}×{side} to {grid[0]}×{grid[1]} patches for --img-size {source.img_size}"
        return module, state
    size = side * int(patch[0])
    overrides["img_size"] = f"{size}, from the weights"
    return _create(name, {**arguments, "img_size": size}, source), state


def _image_size(module: Any) -> int | None:
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2 and size[0] == size[1]:
        return int(size[0])
    return None
