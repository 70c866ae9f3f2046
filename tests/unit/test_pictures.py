"""The device's pictures against the host's: two writings of one preparation, held to the same pixels."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from device_agents import pictures
from device_agents.errors import Refused
from device_agents.wire import Preprocessing
from edgevit.data import load_pixels
from edgevit.errors import DataError

PLAIN = Preprocessing(24, 24, 27, "bicubic", "center", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))

preparations = st.builds(
    Preprocessing,
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    resize_short=st.integers(1, 48),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
    mean=st.just((0.5, 0.4, 0.3)),
    std=st.just((0.25, 0.2, 0.3)),
)


def drawn(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient: what every filter and every crop shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@settings(max_examples=150, deadline=None)
@given(preparations, st.integers(1, 60), st.integers(1, 60), st.sampled_from(["PNG", "JPEG"]))
def test_the_device_makes_the_hosts_pixels_of_any_size_and_preparation(
    preparation: Preprocessing, width: int, height: int, kind: str
) -> None:
    data = encoded(drawn(width, height), kind)
    try:
        expected = load_pixels(data, preparation)
    except DataError:  # so narrow that a side is rounded to nothing
        with pytest.raises(Refused, match="cannot be resized"):
            pictures.load_picture(data, preparation)
        return
    got = pictures.load_picture(data, preparation)
    assert got.dtype == np.uint8 and np.array_equal(got, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode(mode: str) -> None:
    image = Image.new("I;16", (30, 20), 40_000) if mode == "I;16" else drawn(30, 20, mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(pictures.load_picture(data, PLAIN), load_pixels(data, PLAIN))


def test_an_array_of_another_size_goes_the_way_of_a_file() -> None:
    image = drawn(50, 31)
    got = pictures.load_picture(np.asarray(image), PLAIN)
    assert np.array_equal(got, load_pixels(encoded(image, "PNG"), PLAIN))
    ready = np.asarray(drawn(24, 24))
    assert pictures.load_picture(ready, PLAIN) is ready


def test_files_that_claim_too_much_or_end_early_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(drawn(64, 64), "JPEG")
    with pytest.raises(Refused, match="not a picture"):
        pictures.load_picture(data[: len(data) // 2], PLAIN)
    monkeypatch.setattr(pictures, "MAX_PICTURE_PIXELS", 64 * 64 - 1)
    with pytest.raises(Refused, match="64 × 64 pixels"):
        pictures.load_picture(data, PLAIN)
    wider = dataclasses.replace(PLAIN, width=300)
    assert pictures.load_picture(np.zeros((24, 300, 3), np.uint8), wider).shape == (24, 300, 3)
