"""``MODEL`` and its weights → a torch module in eval mode, with the preprocessing and labels that belong to it.

``MODEL`` is a timm name or ``package.module:factory``. What the weights say (classes, image size, extra tokens) is taken from
them; what a person sets by hand wins and is recorded in :attr:`ModelInfo.overrides`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents.wire import ModelInfo, Preprocessing, WireError
from edgevit.cache import Cache, digest_of, hash_file
from edgevit.data import resize_short_of
from edgevit.errors import ModelError, UnknownName
from edgevit.labels import read_labels
from edgevit.torchsetup import import_timm, import_torch
from edgevit.weights import load_strictly, read_weights

if TYPE_CHECKING:
    import torch

_EDGEVIT = ("edgevit", "device_agents")
_OPTIONS = {
    "pretrained": "--pretrained",
    "num_classes": "--num-classes",
    "img_size": "--img-size",
    "checkpoint_path": "--weights",
}
"""Argument of every timm model → the option that says it, which the weights are held against."""


@dataclass(frozen=True)
class ModelSource:
    """What a person asked for. Exactly one of ``weights``, ``pretrained`` and ``random_weights`` must be set; the fields from
    ``img_size`` on override what model and weights say. ``mean`` and ``std`` are per RGB channel on the [0, 1] scale."""

    name: str
    weights: Path | None = None
    pretrained: bool = False
    random_weights: bool = False
    num_classes: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    unsafe_pickle: bool = False
    labels: Path | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    seed: int = 0

    @property
    def is_factory(self) -> bool:
        return ":" in self.name

    def fast_digest(self, cache: Cache) -> str | None:
        """SHA-256 that stands for this source without importing torch or timm; None where only loading can tell (hub weights
        that may have moved, a factory whose code may have changed)."""
        if self.is_factory or self.pretrained:
            return None
        weights = cache.file_digest(self.weights) if self.weights and self.weights.is_file() else None
        if self.weights and weights is None:
            return None
        labels = cache.file_digest(self.labels) if self.labels and self.labels.is_file() else None
        return digest_of("source", self._settings(), weights, str(self.weights or ""), labels)

    def _settings(self) -> list[Any]:
        skipped = ("weights", "labels", "unsafe_pickle")
        return [[k, v] for k, v in sorted(vars(self).items()) if k not in skipped]


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode whose output on (N, 3, height, width) float32 is (N, classes) float32, and what belongs to it."""

    module: torch.nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    info: ModelInfo


def load_model(source: ModelSource) -> LoadedModel:
    """Build the module, load its weights strictly and run it once.

    Raises :class:`UnknownName` for a timm name there is none of (with the nearest), :class:`ModelError` for weights that are
    missing, truncated or foreign and for a factory that does not deliver a model, :class:`MissingExtra` without torch or timm.
    """
    chosen = [source.weights is not None, source.pretrained, source.random_weights]
    if sum(chosen) != 1:
        got = "none of them" if not any(chosen) else "more than one"
        raise ModelError(
            f"where do the weights of {source.name} come from? expected one of --weights FILE, --pretrained, --random-weights; "
            f"got {got}",
            hint=f"edgevit build {source.name} --weights FILE …",
        )
    for argument in () if source.is_factory else source.model_args:
        if argument in _OPTIONS:
            raise ModelError(
                f"got --model-arg {argument}={source.model_args[argument]} for {source.name}, expected {_OPTIONS[argument]}",
                hint=f"{_OPTIONS[argument]} in its place, or leave it out where the weights say it",
            )
    torch = import_torch()
    overrides: dict[str, str] = {}
    state = None if source.weights is None else read_weights(Path(source.weights), source.unsafe_pickle)
    torch.manual_seed(source.seed)
    if source.is_factory:
        module, config = _call_factory(source, overrides)
    else:
        from edgevit.timmsource import build_timm_module

        module, config, state = build_timm_module(source, state, overrides)
    module.eval()
    if state is not None:
        load_strictly(module, state, str(source.weights), source.name)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    preprocessing = _preprocessing(source, config, overrides)
    classes = _classes_by_running(module, preprocessing, source.name)
    if source.num_classes is not None and classes != source.num_classes:
        raise ModelError(f"{source.name} gives {classes} outputs, --num-classes asked for {source.num_classes}")
    labels = read_labels(source.labels, classes, source.name)
    from edgevit.macs import count_macs

    info = ModelInfo(
        name=source.name,
        digest=digest_of(
            source._settings(), module_digest(module), _factory_source(source), vars(preprocessing), list(labels or ())
        ),
        weights=_weights_text(source),
        classes=classes,
        parameters=sum(p.numel() for p in module.parameters()),
        macs=count_macs(module, preprocessing),
        overrides={k: v[:400] for k, v in overrides.items()},
    )
    return LoadedModel(module, preprocessing, labels, info)


def _call_factory(source: ModelSource, overrides: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    torch = import_torch()
    import_timm()  # Factories import it too, and only this door knows how where torchvision does not fit torch.
    module_name, _, attribute = source.name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as e:
        if e.name is None or not (module_name == e.name or module_name.startswith(e.name + ".")):
            raise ModelError(f"importing {module_name} failed: {e}") from e
        raise ModelError(f"no Python module named {module_name!r} (looked in {here} and the installed packages)") from e
    except AttributeError as e:
        known = [n for n, v in vars(importlib.import_module(module_name)).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(f"factory in {module_name}", attribute, known) from e
    arguments = dict(source.model_args)
    if source.num_classes is not None:
        arguments.setdefault("num_classes", source.num_classes)
    try:
        module = factory(**arguments)
    except Exception as e:
        raise ModelError(f"{source.name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) raised {_said(e)}") from e
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{source.name} returned {type(module).__name__}, expected a torch.nn.Module")
    overrides.update({f"arg {k}": str(v) for k, v in arguments.items()})
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    config = config if isinstance(config, dict) else vars(config)
    size = config.get("input_size")
    needed = {
        "--img-size": source.img_size or size,
        "--mean": source.mean or config.get("mean"),
        "--std": source.std or config.get("std"),
    }
    missing = [option for option, value in needed.items() if not value]
    if missing:
        raise ModelError(
            f"{source.name} does not say how its images are prepared: {', '.join(missing)} unknown",
            hint=f"pass {' … '.join(missing)} …, or give the module an attribute pretrained_cfg with input_size, mean and std",
        )
    full = {"input_size": (3, source.img_size, source.img_size) if source.img_size else size, **config}
    full.setdefault("crop_pct", 1.0)
    full.setdefault("interpolation", "bicubic")
    full.setdefault("crop_mode", "center")
    return module, full


def _preprocessing(source: ModelSource, config: Mapping[str, Any], overrides: dict[str, str]) -> Preprocessing:
    """From the resolved data config, a person's overrides on top. Raises :class:`ModelError` for what the wire cannot say."""
    channels, height, width = config["input_size"]
    if source.img_size:
        height = width = source.img_size
        overrides["img_size"] = str(source.img_size)
    if channels != 3 or height != width:
        raise ModelError(f"{source.name} takes {channels}×{height}×{width} images, expected three channels and a square")
    set_by_hand = {
        "crop_pct": source.crop_pct, "interpolation": source.interpolation, "mean": source.mean, "std": source.std,
    }  # fmt: skip
    values = {k: config.get(k) for k in ("crop_pct", "interpolation", "mean", "std", "crop_mode")}
    for key, value in set_by_hand.items():
        if value is not None:
            overrides[key] = str(value)
            values[key] = value
    crop_pct = float(values["crop_pct"] or 1.0)
    if not 0 < crop_pct <= 1:
        raise ModelError(f"got crop_pct {crop_pct}, expected above 0 and up to 1")
    try:
        prepared = Preprocessing(
            height=int(height),
            width=int(width),
            resize_short=resize_short_of(int(height), crop_pct),
            interpolation=str(values["interpolation"]),
            crop_mode=str(values["crop_mode"] or "center"),
            mean=tuple(float(v) for v in values["mean"] or ()),
            std=tuple(float(v) for v in values["std"] or ()),
        )
        from device_agents.wire import decode, encode

        return decode(Preprocessing, encode(prepared), "preprocessing")
    except WireError as e:
        raise ModelError(f"{source.name}: {e}") from e


def _classes_by_running(module: Any, preprocessing: Preprocessing, name: str) -> int:
    torch = import_torch()
    image = torch.zeros(1, 3, preprocessing.height, preprocessing.width)
    try:
        with torch.no_grad():
            output = module(image)
    except Exception as e:
        raise ModelError(f"{name} failed on one {preprocessing.height}×{preprocessing.width} image: {_said(e)}") from e
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"{name} returned {_described(output)} for one image, expected a (1, classes) float tensor of logits",
            hint="wrap it in a module whose forward returns the logits alone, and name that factory",
        )
    if output.ndim != 2 or output.shape[0] != 1 or output.shape[1] < 2 or not output.is_floating_point():
        raise ModelError(
            f"{name} returned {_described(output)} for one image, expected a (1, classes) float tensor with at least two "
            f"classes",
            hint="wrap it in a module whose forward pools and classifies, such as timm's own with num_classes",
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError(f"{name} returned NaN or infinity for a black image")
    return int(output.shape[1])


def _described(output: Any) -> str:
    """``dict of features: torch.float32 of shape (1, 17, 48), …``: what a module returned, two levels deep at most."""
    torch = import_torch()
    if isinstance(output, torch.Tensor):
        return f"{output.dtype} of shape {tuple(output.shape)}"
    if not isinstance(output, (Mapping, tuple, list)):
        return type(output).__name__
    named: dict[Any, Any] = dict(output.items() if isinstance(output, Mapping) else enumerate(output))
    parts = [
        f"{key}: {_described(value) if isinstance(value, torch.Tensor) else type(value).__name__}"
        for key, value in named.items()
    ]
    return f"{type(output).__name__} of {', '.join(parts[:4])}{', …' if len(parts) > 4 else ''}"


def module_digest(module: Any) -> str:
    """SHA-256 over structure, every weight and buffer, the plain settings of every part (heads, scales, which tokens merge),
    and the source files of the person's own classes, with what those import."""
    digest = hashlib.sha256(str(module).encode())
    for name, tensor in sorted({**module.state_dict(), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    torchs_own = vars(import_torch().nn.Module()).keys()
    settings = [
        [name, key, _plain(value)]
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if key not in torchs_own
    ]
    digest.update(digest_of(settings).encode())
    own = {type(m).__module__ for m in module.modules()} - {"__main__"}
    sources = _sources(name for name in own if name.split(".")[0] not in ("torch", "timm"))
    digest.update(digest_of(sources).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A setting as JSON holds it; of anything but numbers, words and collections of them only its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return [[_plain(k), _plain(v)] for k, v in value.items()]
    return type(value).__qualname__


def _factory_source(source: ModelSource) -> list[list[str]]:
    """:func:`_sources` of a person's factory: it may change a module in ways that no part of it shows."""
    if not source.is_factory:
        return []
    module_name, _, attribute = source.name.partition(":")
    defined_in = getattr(getattr(sys.modules[module_name], attribute), "__module__", module_name)
    return _sources((module_name, defined_in))


def _sources(modules: Iterable[str]) -> list[list[str]]:
    """Name and SHA-256 of the files of the Python modules ``modules``, and of those of a person's own that they import, and so
    on: an activation that stands in a file beside them is part of the model too. What is installed is not looked into."""
    asked = set(modules)
    waiting, found = list(asked), dict[str, str]()
    while waiting:
        name = waiting.pop()
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if name in found or file.suffix != ".py" or not file.is_file():
            continue
        own = not _is_installed(name, file)
        if own or name in asked:
            found[name] = hash_file(file)
        if own:
            waiting += _imports(file, name if file.stem == "__init__" else name.rpartition(".")[0])
    return [[name, found[name]] for name in sorted(found)]


def _is_installed(name: str, file: Path) -> bool:
    """Whether a version tells of ``file``; edgevit's own code has a digest of its own."""
    packages = {"site-packages", "dist-packages"} & set(file.parts)
    return bool(packages) or file.is_relative_to(sysconfig.get_path("stdlib")) or name.split(".")[0] in _EDGEVIT


def _imports(file: Path, package: str) -> list[str]:
    """Names of the modules that the source ``file`` of ``package`` imports, wherever in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


def _weights_text(source: ModelSource) -> str:
    if source.weights is not None:
        return Path(source.weights).name
    return "pretrained" if source.pretrained else f"random, seed {source.seed}"


def _said(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {first}"
