"""Images in, uint8 pixels out: folders, CSV and parquet, cut by the model's own transform.

``DATA`` is an image folder (one subfolder a class, or flat and then unlabelled; a folder with a ``labels.csv`` is read as that
CSV), a CSV of ``path,label`` with paths relative to it, or a parquet file with ``image`` (bytes, or a struct of ``bytes`` and
``path``) and ``label``. Pixels come from Pillow alone and equal those of ``timm.data.create_transform(…, is_training=False)``
bit for bit before its normalisation, so no torch is needed to feed a model.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.cache import Cache, digest_of
from edgevit.errors import DataError, MissingExtra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
LABELS_FILE = "labels.csv"
"""A folder that holds this file is read as that CSV."""

MAX_ENLARGEMENT = 16
"""CIFAR's 32 pixels in a model of 224 are enlarged eight times; an image of a few pixels shows a model nothing."""

MAX_IMAGE_PIXELS = 200_000_000
"""A file that claims more pixels than this is refused before it is decoded (a decompression bomb)."""

_INDEX = re.compile(r"-?[0-9]+(\.0+)?")
"""A class index as it is written; tables that were once without some labels hold the others as 3.0."""


@dataclass(frozen=True)
class ImageItem:
    """One image: a file of its own, or row ``row`` of the parquet file ``path``. ``where`` is how people find it."""

    path: Path
    row: int | None
    label: str | None
    where: str


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. ``labels`` are class indices; ``class_names`` are known where the labels were written as names.
    ``digest`` covers the bytes of every image and the labels as written."""

    name: str
    items: tuple[ImageItem, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    digest: str

    def __len__(self) -> int:
        return len(self.items)


def open_data(path: Path, cache: Cache | None = None) -> ImageSet:
    """List the images of ``path`` and read their labels; no image is decoded yet.

    Labels written as names become indices into the sorted names, until :func:`match_labels` holds them against a model.
    Raises :class:`DataError` for nothing there, missing columns and half-labelled sets.
    """
    path = Path(path)
    if path.is_dir() and (path / LABELS_FILE).is_file():
        path = path / LABELS_FILE
    if path.is_dir():
        items = _list_folder(path)
    elif not path.is_file():
        raise DataError(f"no image folder, CSV or parquet file at {path}", hint=f"ls {path.parent}")
    elif path.suffix.lower() == ".csv":
        items = _list_csv(path)
    elif path.suffix.lower() in (".parquet", ".pq"):
        items = _list_parquet(path)
    else:
        raise DataError(f"{path} is neither an image folder nor a .csv or .parquet file")
    if not items:
        raise DataError(f"{path} holds no image", hint="give a folder of class folders, or a CSV of path,label")
    unlabelled = [i for i in items if i.label is None]
    if unlabelled and len(unlabelled) != len(items):
        raise DataError(f"{path}: {len(unlabelled)} of {len(items)} images have no label, the first at {unlabelled[0].where}")
    labels, names = (None, None) if unlabelled else _index_labels([i.label or "" for i in items])
    return ImageSet(_name(path), tuple(items), labels, names, _digest(items, cache or Cache()))


def _name(path: Path) -> str:
    """What tells one set from another in results: a folder's name, and the file's behind it where a folder may hold several."""
    place = path.absolute()
    if place.is_dir():
        return place.name
    return place.parent.name if place.name == LABELS_FILE else f"{place.parent.name}/{place.name}"


def match_labels(images: ImageSet, classes: int, model_names: Sequence[Sequence[str]], model: str) -> ImageSet:
    """The same images with labels as indices of the *model's* classes.

    ``model_names`` lists naming schemes of the model (its label names, ImageNet synsets …); written names are looked up in the
    first scheme that knows them all. Raises :class:`DataError` for an index out of range, a name no scheme has, and one that
    stands for several classes.
    """
    if images.labels is None:
        return images
    if images.class_names is None:
        for item, label in zip(images.items, images.labels, strict=True):
            if not 0 <= label < classes:
                raise DataError(
                    f"{item.where}: got label {label}, expected 0 to {classes - 1}, the {classes} classes of {model}"
                )
        return images
    used = sorted({i.label or "" for i in images.items})
    for scheme in model_names:
        index = {name: i for i, name in enumerate(scheme)}
        if all(name in index for name in used):
            _verify_unique(images, scheme, model)
            return replace(images, labels=tuple(index[i.label or ""] for i in images.items), class_names=tuple(scheme))
    if not model_names:
        if len(images.class_names) != classes:
            raise DataError(
                f"{images.items[0].where} and the rest: got {len(images.class_names)} class names such as "
                f"{images.class_names[0]!r}, {model} has {classes} classes",
                hint="give the model's class names in order with --labels FILE",
            )
        return images
    known = set(model_names[0])
    item = next(i for i in images.items if i.label not in known)
    near = difflib.get_close_matches(item.label or "", list(model_names[0]), n=1, cutoff=0.5)
    tail = f"; did you mean {near[0]!r}?" if near else f"; {model} knows {', '.join(list(model_names[0])[:5])} …"
    raise DataError(
        f"{item.where}: no class named {item.label!r}{tail}", hint="give the model's class names with --labels FILE"
    )


def _verify_unique(images: ImageSet, scheme: Sequence[str], model: str) -> None:
    """ImageNet has two cranes, a bird and a machine: which of them is meant cannot be told from that name."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(scheme):
        places.setdefault(name, []).append(i)
    item = next((i for i in images.items if len(places[i.label or ""]) > 1), None)
    if item is not None:
        classes = " and ".join(map(str, places[item.label or ""]))
        raise DataError(
            f"{item.where}: {item.label!r} names several classes of {model}: {classes}",
            hint="write the classes as indices (or, for ImageNet, as synsets such as n02012849)",
        )


def pixels(
    images: ImageSet, preprocessing: Preprocessing, indices: Sequence[int], on_done: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """The chosen images as uint8 (len(indices), height, width, 3), in the order asked; ``on_done`` hears how many are ready.

    Raises :class:`DataError` naming the file and row of an image that cannot be read, or is too small to teach anything.
    """
    import numpy as np

    out = np.empty((len(indices), preprocessing.height, preprocessing.width, 3), np.uint8)
    jobs = _read_in_order(images, indices)

    def fill(job: tuple[int, ImageItem, bytes | None]) -> None:
        slot, item, data = job
        out[slot] = _load(item.path if data is None else data, preprocessing, item.where, of_a_set=True)

    with ThreadPoolExecutor(max_workers=4) as pool:
        for done, _ in enumerate(pool.map(fill, jobs), start=1):
            if on_done:
                on_done(done)
    return out


def load_pixels(source: Path | bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One image as uint8 (height, width, 3), resized and cropped as the model wants it.

    Raises :class:`DataError` where it cannot be read, :class:`MissingExtra` where numpy or Pillow is not installed.
    """
    return _load(source, preprocessing, "the image" if isinstance(source, bytes) else str(source), of_a_set=False)


def import_imaging() -> tuple[Any, Any]:
    """(numpy, PIL.Image). MissingExtra where one is not installed: the operator's own install has neither."""
    try:
        import numpy
    except ModuleNotFoundError as e:
        raise MissingExtra("numpy", "runtime") from e
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise MissingExtra("pillow", "runtime") from e
    return numpy, Image


def _load(source: Path | bytes, preprocessing: Preprocessing, where: str, *, of_a_set: bool) -> NDArray[np.uint8]:
    numpy, Image = import_imaging()
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError as e:
        raise DataError(f"{where}: there is no such file") from e
    except Image.UnidentifiedImageError as e:
        raise DataError(f"{where}: not an image that Pillow can read") from e
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"{where}: the image is damaged or unreadable: {e}") from e
    short = min(image.size)
    if of_a_set and preprocessing.resize_short > MAX_ENLARGEMENT * short:
        raise DataError(
            f"{where}: {image.width} × {image.height} pixels would be enlarged {preprocessing.resize_short / short:.0f} times, "
            f"at most {MAX_ENLARGEMENT} are accepted",
            hint="give images such as the model will see",
        )
    try:
        fitted: NDArray[np.uint8] = numpy.asarray(fit_image(image, preprocessing))
        return fitted
    except ValueError as e:
        raise DataError(f"{where}: {image.width} × {image.height} pixels cannot be resized: {e}") from e


def fit_image(image: Any, p: Preprocessing) -> Any:
    """A Pillow RGB image → one of (width, height), as timm's evaluation transform does it for square inputs."""
    from PIL import Image

    resample = getattr(Image.Resampling, p.interpolation.upper())
    width, height = image.size
    if p.crop_mode == "squash":
        size = (p.resize_short, p.resize_short)
    elif p.crop_mode == "border":
        ratio = max(height / p.resize_short, width / p.resize_short)
        size = (round(width / ratio), round(height / ratio))
    else:
        long = int(p.resize_short * max(width, height) / min(width, height))
        size = (p.resize_short, long) if width <= height else (long, p.resize_short)
    # torchvision returns the image untouched where the size is right already; so does resizing by Pillow.
    image = image.resize(size, resample)
    fill = tuple(round(255 * v) for v in p.mean) if p.crop_mode == "border" else (0, 0, 0)
    return _crop_or_pad(image, p.width, p.height, fill)


def _crop_or_pad(image: Any, width: int, height: int, fill: tuple[int, ...]) -> Any:
    from PIL import Image

    if image.width < width or image.height < height:
        left, top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
        canvas.paste(image, (left, top))
        image = canvas
    # round() halves to even, as torchvision does: a crop off by one pixel changes every output.
    x, y = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((x, y, x + width, y + height))


def resize_short_of(size: int, crop_pct: float) -> int:
    """The side before the crop, in pixels, by timm's own rounding."""
    return math.floor(size / crop_pct)


def _list_folder(root: Path) -> list[ImageItem]:
    def images_of(folder: Path, label: str | None) -> list[ImageItem]:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        return [ImageItem(p, None, label, str(p)) for p in found]

    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    labelled = [item for folder in classes for item in images_of(folder, folder.name)]
    flat = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if labelled and flat:
        raise DataError(f"{root} holds images both in class folders and beside them, such as {flat[0].name}: labels unclear")
    return labelled or [ImageItem(p, None, None, str(p)) for p in flat]


def _list_csv(path: Path) -> list[ImageItem]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = [c.strip() for c in reader.fieldnames or []]
            reader.fieldnames = columns
            if "path" not in columns:
                raise DataError(f"{path}:1: got columns {', '.join(columns) or 'none'}, expected path,label")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: not a CSV file in UTF-8: {e}") from e
    items = []
    for line, row in rows:
        name, label = (row.get("path") or "").strip(), (row.get("label") or "").strip()
        if not name:
            raise DataError(f"{path}:{line}: the path is empty")
        file = path.parent / name
        if not file.is_file():
            raise DataError(f"{path}:{line}: there is no image at {file}")
        items.append(ImageItem(file, None, label or None, f"{path}:{line}: {name}"))
    return items


def _list_parquet(path: Path) -> list[ImageItem]:
    pq = _parquet()
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if "image" not in columns:
            raise DataError(f"{path}: got columns {', '.join(columns)}, expected image and label")
        labels = file.read(columns=["label"]).column("label").to_pylist() if "label" in columns else None
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: not a parquet file: {e}") from e
    written = [None] * file.metadata.num_rows if labels is None else [None if v is None or v != v else str(v) for v in labels]
    return [ImageItem(path, row, label, f"{path} row {row}") for row, label in enumerate(written)]


def _parquet() -> Any:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as e:
        raise MissingExtra("pyarrow", "build") from e
    return pq


def _read_in_order(images: ImageSet, indices: Sequence[int]) -> Iterator[tuple[int, ImageItem, bytes | None]]:
    """(slot, item, bytes or None for a file of its own); parquet rows are read in batches and only where wanted."""
    inside: dict[int, list[int]] = {}
    for slot, index in enumerate(indices):
        row = images.items[index].row
        if row is None:
            yield slot, images.items[index], None
        else:
            inside.setdefault(row, []).append(slot)
    if not inside:
        return
    first, path = 0, images.items[indices[0]].path
    for batch in _parquet().ParquetFile(path).iter_batches(batch_size=256, columns=["image"]):
        column = batch.column(0)
        for offset in range(batch.num_rows):
            for slot in inside.get(first + offset, ()):
                value = column[offset].as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                item = images.items[indices[slot]]
                if not isinstance(data, bytes):
                    raise DataError(f"{item.where}: got {type(data).__name__}, expected the bytes of an image")
                yield slot, item, data
        first += batch.num_rows


def _index_labels(written: list[str]) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    if all(_INDEX.fullmatch(w) for w in written):
        return tuple(int(w.partition(".")[0]) for w in written), None
    names = sorted(set(written))
    index = {name: i for i, name in enumerate(names)}
    return tuple(index[w] for w in written), tuple(names)


def _digest(items: Sequence[ImageItem], cache: Cache) -> str:
    """Over image bytes and labels; files are read again only where path, size or time of any of them has changed."""
    stamps = []
    for item in items:
        status = item.path.stat()
        stamps.append([str(item.path.absolute()), item.row, status.st_size, status.st_mtime_ns, item.label])
    key = digest_of("data set", stamps)
    known = cache.get(key)
    if known is not None and isinstance(known.meta.get("digest"), str):
        return str(known.meta["digest"])
    if items[0].row is not None:
        content: list[Any] = [cache.file_digest(items[0].path), [i.label for i in items]]
    else:
        from edgevit.cache import hash_file

        content = [[hash_file(i.path), i.label] for i in items]
    digest = digest_of(json.loads(json.dumps(content)))
    cache.put(key, {}, {"digest": digest})
    return digest
