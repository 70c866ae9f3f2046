"""Images: every way to give them, pixels equal to timm's own transform, and clear errors for what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_agents.wire import Preprocessing
from edgevit.cache import Cache
from edgevit.data import load_pixels, match_labels, open_data, pixels, resize_short_of
from edgevit.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).resize((width, height))


def prepared(size: int = 32, interpolation: str = "bicubic", crop_mode: str = "center", crop_pct: float = 0.9) -> Preprocessing:
    return Preprocessing(size, size, resize_short_of(size, crop_pct), interpolation, crop_mode, MEAN, STD)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat", "dog", "cat", "owl")):
        place = tmp_path / "pets" / name
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(90, 70), (71, 133), (40, 40), (20, 57)])
def test_pixels_equal_timms_own_transform(interpolation: str, crop_mode: str, crop_pct: float, shape: tuple[int, int]) -> None:
    from edgevit.torchsetup import import_timm

    timm = import_timm()
    image = picture(1, *shape)
    transform = timm.data.create_transform(
        input_size=(3, 32, 32),
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        is_training=False,
    )
    theirs = transform(image).numpy()
    stream = io.BytesIO()
    image.save(stream, "PNG")
    ours = load_pixels(stream.getvalue(), prepared(32, interpolation, crop_mode, crop_pct))
    normalised = ((ours / np.float32(255) - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)).transpose(2, 0, 1)
    assert np.abs(normalised - theirs).max() < 1e-6


def test_class_folders(folder: Path, cache: Cache) -> None:
    images = open_data(folder, cache)
    assert images.class_names == ("cat", "dog", "owl")
    assert images.labels == (0, 0, 1, 2)
    assert pixels(images, prepared(), [3, 0]).shape == (2, 32, 32, 3)


def test_a_flat_folder_has_no_labels(tmp_path: Path, cache: Cache) -> None:
    picture(0).save(tmp_path / "a.png")
    assert open_data(tmp_path, cache).labels is None


def test_csv_with_indices_and_names(folder: Path, cache: Cache) -> None:
    numbers = folder / "numbers.csv"
    numbers.write_text("path,label\ncat/0.png,2\nowl/3.png,0\n")
    assert open_data(numbers, cache).labels == (2, 0)
    names = folder / "names.csv"
    names.write_text("path,label\ncat/0.png,cat\nowl/3.png,owl\n")
    matched = match_labels(open_data(names, cache), 3, [("dog", "owl", "cat")], "a model")
    assert matched.labels == (2, 1)


def test_indices_of_a_table_that_was_once_without_some_are_indices(folder: Path, cache: Cache) -> None:
    """3.0 taken for a name came behind 11.0: every label was another class, and top-1 a chance."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    numbers = [11.0, 3.0, 0.0, 2.0]
    table = folder / "numbers.csv"
    table.write_text("".join(["path,label\n", *(f"cat/0.png,{n}\n" for n in numbers)]))
    images = [(folder / "cat" / "0.png").read_bytes()] * len(numbers)
    pq.write_table(pa.table({"image": images, "label": numbers}), folder / "numbers.parquet")
    for place in (table, folder / "numbers.parquet"):
        found = open_data(place, cache)
        assert (found.labels, found.class_names) == ((11, 3, 0, 2), None), place.name
    pq.write_table(pa.table({"image": images, "label": [*numbers[:3], float("nan")]}), folder / "half.parquet")
    with pytest.raises(DataError, match=r"1 of 4 images have no label, the first at .*half.parquet row 3"):
        open_data(folder / "half.parquet", cache)


def test_sets_of_one_folder_have_names_of_their_own(tmp_path: Path, cache: Cache) -> None:
    """By its name results tell whether two variants were scored on the same images."""
    folder = tmp_path / "val.v2"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert open_data(folder, cache).name == "val.v2"
    for name in ("clean.csv", "noisy.csv", "labels.csv"):
        (folder / name).write_text("path,label\na.png,dog\n")
    names = [open_data(folder / name, cache).name for name in ("clean.csv", "noisy.csv", "labels.csv")]
    assert names == ["val.v2/clean.csv", "val.v2/noisy.csv", "val.v2"] and open_data(folder, cache).name == "val.v2"


def test_a_name_of_two_classes_is_refused(tmp_path: Path, cache: Cache) -> None:
    """ImageNet's crane is a bird and a machine."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "t.csv"
    table.write_text("path,label\na.png,crane\n")
    with pytest.raises(DataError, match=r"t.csv:2: a.png: 'crane' names several classes of a model: 1 and 2"):
        match_labels(open_data(table, cache), 3, [("dog", "crane", "crane")], "a model")
    table.write_text("path,label\na.png,dog\n")
    assert match_labels(open_data(table, cache), 3, [("dog", "crane", "crane")], "a model").labels == (0,)


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_gives_the_same_pixels_as_files(folder: Path, cache: Cache, tmp_path: Path, as_struct: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = open_data(folder, cache)
    raw = [item.path.read_bytes() for item in images.items]
    column: list[Any] = [{"bytes": b, "path": "x.png"} for b in raw] if as_struct else raw
    path = tmp_path / "pets.parquet"
    pq.write_table(pa.table({"image": column, "label": list(images.labels or ())}), path)
    inside = open_data(path, cache)
    assert inside.labels == images.labels
    np.testing.assert_array_equal(pixels(inside, prepared(), [2, 0, 3]), pixels(images, prepared(), [2, 0, 3]))


def test_nothing_there(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(DataError, match="no image"):
        open_data(tmp_path, cache)
    with pytest.raises(DataError, match="no image folder"):
        open_data(tmp_path / "absent", cache)
    empty = tmp_path / "empty.csv"
    empty.write_text("path,label\n")
    with pytest.raises(DataError, match="holds no image"):
        open_data(empty, cache)


def test_missing_columns_name_what_is_there(tmp_path: Path, cache: Cache) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = tmp_path / "t.csv"
    table.write_text("file,class\na.png,1\n")
    with pytest.raises(DataError, match="got columns file, class, expected path,label"):
        open_data(table, cache)
    parquet = tmp_path / "t.parquet"
    pq.write_table(pa.table({"picture": [b"x"]}), parquet)
    with pytest.raises(DataError, match="got columns picture"):
        open_data(parquet, cache)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a parquet file"):
        open_data(tmp_path / "broken.parquet", cache)


def test_a_missing_file_and_half_labels_name_the_row(folder: Path, cache: Cache) -> None:
    table = folder / "t.csv"
    table.write_text("path,label\ncat/0.png,1\ncat/absent.png,1\n")
    with pytest.raises(DataError, match=r"t\.csv:3: there is no image"):
        open_data(table, cache)
    table.write_text("path,label\ncat/0.png,1\ndog/1.png,\n")
    with pytest.raises(DataError, match=r"1 of 2 images have no label.*t\.csv:3"):
        open_data(table, cache)


def test_an_unreadable_image_names_file_and_row(folder: Path, cache: Cache) -> None:
    (folder / "dog" / "1.png").write_bytes(b"this is no image")
    with pytest.raises(DataError, match=r"dog/1\.png: not an image"):
        pixels(open_data(folder, cache), prepared(), [0, 1, 2, 3])
    whole = (folder / "owl" / "3.png").read_bytes()
    (folder / "owl" / "3.png").write_bytes(whole[: len(whole) // 2])
    table = folder / "t.csv"
    table.write_text("path,label\nowl/3.png,1\n")
    with pytest.raises(DataError, match=r"t\.csv:2: owl/3\.png: the image is damaged"):
        pixels(open_data(table, cache), prepared(), [0])


@pytest.mark.parametrize(("size", "taken"), [((14, 14), True), ((13, 13), False), ((1, 1), False), ((13, 400), False)])
def test_a_picture_of_a_few_pixels_teaches_nothing(tmp_path: Path, cache: Cache, size: tuple[int, int], taken: bool) -> None:
    """A set of them is refused; a person's own picture may be as small as it is."""
    picture(3, *size).save(tmp_path / "tiny.png")
    wanted, images = prepared(224, crop_pct=1.0), open_data(tmp_path, cache)
    assert load_pixels(tmp_path / "tiny.png", wanted).shape == (224, 224, 3)
    if taken:
        assert pixels(images, wanted, [0]).shape == (1, 224, 224, 3)
        return
    with pytest.raises(DataError, match=rf"tiny\.png: {size[0]} × {size[1]} pixels would be enlarged \d+ times, at most 16"):
        pixels(images, wanted, [0])


def test_labels_out_of_range_and_unknown_names(folder: Path, cache: Cache) -> None:
    table = folder / "t.csv"
    table.write_text("path,label\ncat/0.png,1\ndog/1.png,7\n")
    with pytest.raises(DataError, match=r"t\.csv:3.*got label 7, expected 0 to 2"):
        match_labels(open_data(table, cache), 3, [], "a model")
    with pytest.raises(DataError, match="no class named 'owl'; did you mean 'owls'"):
        match_labels(open_data(folder, cache), 3, [("cat", "dog", "owls")], "a model")
    with pytest.raises(DataError, match="got 3 class names such as 'cat', a model has 5"):
        match_labels(open_data(folder, cache), 5, [], "a model")


def test_the_digest_follows_bytes_and_labels(folder: Path, cache: Cache) -> None:
    first = open_data(folder, cache).digest
    assert open_data(folder, cache).digest == first
    picture(99).save(folder / "cat" / "0.png")
    changed = open_data(folder, cache).digest
    assert changed != first
    (folder / "dog").rename(folder / "eel")
    assert open_data(folder, cache).digest not in (first, changed)


def test_a_folder_with_a_labels_file_is_read_as_that_csv(tmp_path: Path, cache: Cache) -> None:
    place = tmp_path / "set"
    (place / "images").mkdir(parents=True)
    for i in range(3):
        picture(i).save(place / "images" / f"{i}.png")
    (place / "labels.csv").write_text("path,label\nimages/2.png,7\nimages/0.png,1\n")
    found = open_data(place, cache)
    assert (found.labels, found.name, len(found)) == ((7, 1), "set", 2)
    assert [i.path.name for i in found.items] == ["2.png", "0.png"]
