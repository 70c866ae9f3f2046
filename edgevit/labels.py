"""Class names: from a person's file, else the ImageNet-1k names that timm carries."""

from __future__ import annotations

import json
from pathlib import Path

from edgevit.errors import ModelError
from edgevit.torchsetup import import_timm

IMAGENET_CLASSES = 1000
_MAX_NAME = 200


def read_labels(path: Path | None, classes: int, model: str) -> tuple[str, ...] | None:
    """Names in class order from ``path`` (a text of one a line, or a JSON list or {index: name}); without a file the
    ImageNet-1k names for 1,000 classes, else None. Raises :class:`ModelError` for a file that does not name every class."""
    if path is None:
        return imagenet_names() if classes == IMAGENET_CLASSES else None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ModelError(f"the labels {path} cannot be read: {e.strerror}", hint=f"ls {Path(path).parent}") from e
    except UnicodeDecodeError as e:
        raise ModelError(f"the labels {path} cannot be read: got bytes that are not UTF-8, expected one name a line") from e
    names = _from_json(path, text) if Path(path).suffix.lower() == ".json" else [s.strip() for s in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    if len(names) != classes:
        raise ModelError(f"{path} names {len(names)} classes, {model} has {classes}")
    empty = next((i for i, n in enumerate(names) if not n), None)
    if empty is not None:
        raise ModelError(f"{path}: class {empty} has no name")
    return tuple(n[:_MAX_NAME] for n in names)


def _from_json(path: Path, text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ModelError(f"{path} is not JSON: {e}") from e
    if isinstance(value, dict):
        if all(k.isdigit() for k in value):
            value = {int(k): v for k, v in value.items()}
        elif all(isinstance(v, int) for v in value.values()):
            value = {v: k for k, v in value.items()}
        if sorted(value, key=str) != sorted(range(len(value)), key=str):
            raise ModelError(
                f"{path}: got keys {', '.join(map(str, list(value)[:5]))} …, expected the indices 0 to {len(value) - 1}"
            )
        value = [value[i] for i in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ModelError(f"{path}: expected a list of names, or names by index")
    return value


def imagenet_names() -> tuple[str, ...]:
    """Short ImageNet-1k names in class order, from timm."""
    import_timm()
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(str(n)[:_MAX_NAME] for n in info.label_descriptions())


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet ids (``n01440764`` …) in ImageNet-1k class order, from timm: the folder names of ImageNet and its subsets."""
    import_timm()
    from timm.data import ImageNetInfo

    return tuple(str(n) for n in ImageNetInfo().label_names())
