"""Weight files → a state dict, without running anything that a file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevit.errors import MissingExtra, ModelError
from edgevit.torchsetup import import_torch

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts keep the weights, the averaged ones first."""

_SHOWN = 5


def read_weights(path: Path, unsafe_pickle: bool = False) -> dict[str, Any]:
    """Tensors by name from a safetensors or ``.pth``/``.pth.tar`` file, with a ``module.`` prefix dropped.

    Raises :class:`ModelError` for a file that is absent, truncated, a web page, or holds no weights, and for one that needs
    full unpickling unless ``unsafe_pickle`` allows it.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {path}", hint=f"ls {path.parent}")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise ModelError(f"{path} is empty, expected weights")
    if head.lstrip()[:1] == b"<" or head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer" if head.startswith(b"version") else "a web page"
        raise ModelError(f"{path} is {kind}, expected weights", hint="download the file itself, not the page that shows it")
    value = _read_safetensors(path) if _looks_like_safetensors(path, head) else _read_pickle(path, unsafe_pickle)
    state = _unwrap(path, value)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or (len(head) > 8 and head[8:9] == b"{" and head[:2] != b"PK")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as e:
        raise MissingExtra("safetensors", "build") from e
    try:
        state: dict[str, Any] = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as e:
        size = path.stat().st_size
        raise ModelError(
            f"{path} ({size:,} bytes) is truncated or not a safetensors file: {e}", hint="download or copy the file again"
        ) from e
    return state


def _read_pickle(path: Path, unsafe_pickle: bool) -> Any:
    import pickle

    torch = import_torch()
    try:
        return torch.load(str(path), map_location="cpu", weights_only=not unsafe_pickle)
    except pickle.UnpicklingError as e:
        if not unsafe_pickle and "weights_only" in str(e).lower():
            reason = str(e).strip().split("\n")[0][:300]
            raise ModelError(
                f"{path} holds more than weights, and reading it would run code of whoever wrote it: {reason}",
                hint="if you trust where it comes from: --unsafe-pickle",
            ) from e
        raise ModelError(f"{path} is not a file of weights: {_first_line(e)}") from e
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, ImportError) as e:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a file of weights: {_first_line(e)}",
            hint="download or copy the file again",
        ) from e


def _unwrap(path: Path, value: Any) -> dict[str, Any]:
    torch = import_torch()
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    for name in _WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
            break
    if not isinstance(value, Mapping):
        raise ModelError(f"{path} holds {type(value).__name__}, expected tensors by name")
    state = {str(k): v for k, v in value.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise ModelError(f"{path} holds no tensors, only the keys {', '.join(map(str, list(value)[:_SHOWN])) or 'none'}")
    return state


def load_strictly(module: Any, state: Mapping[str, Any], where: str, model: str) -> None:
    """Put ``state`` into ``module``; every key and shape must match, and every number be finite.

    Raises :class:`ModelError` with the first few missing, unexpected and misshapen names, or those that hold NaN or infinity.
    """
    torch = import_torch()
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state]
    unexpected = [k for k in state if k not in wanted]
    wrong = [
        f"{k} {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if parts:
        raise ModelError(
            f"{where} does not fit {model} ({len(wanted)} tensors expected, {len(state)} in the file): {'; '.join(parts)}",
            hint="name the model these weights were trained for, or pass its settings with --model-arg K=V",
        )
    module.load_state_dict(state, strict=True)
    broken = [k for k, v in module.state_dict().items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise ModelError(f"{where}: NaN or infinity in {', '.join(broken[:_SHOWN])}{' …' if len(broken) > _SHOWN else ''}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.split("\n")[0][:300] if text else type(error).__name__
