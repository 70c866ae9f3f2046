"""From a picture to the uint8 pixels that a model takes, as the host makes them: resized and cropped by Pillow.

Twin of ``edgevit/data.py`` on the host, which may not be imported here; a test holds both to the same pixels. Needs numpy, and
Pillow for whatever is not pixels of the model's own size.
"""

from __future__ import annotations

import io
import os
from typing import Any, Tuple

from device_agents import wire
from device_agents.errors import Refused

MAX_PICTURE_PIXELS = 100_000_000
"""A file that claims more is refused before it is decoded: at three bytes each they would fill a small board's memory."""

PILLOW_HINT = "on the host: edgevit target provision NAME --with-pillow"


def load_picture(source: Any, preprocessing: wire.Preprocessing) -> Any:
    """One picture as uint8 (height, width, 3).

    ``source``: a path or the bytes of a JPEG, PNG or any other file that Pillow reads; a path of an ``.npy`` file; a Pillow
    image; or an array, uint8 (H, W, 3) in RGB. An array of the model's own height and width is taken as it is, so that needs no
    Pillow; any other is resized and cropped like a file. Raises ``no-pillow`` or ``bad-image``.
    """
    import numpy as np

    if isinstance(source, (str, os.PathLike)):
        source = _read_file(os.fspath(source))
    if isinstance(source, np.ndarray):
        if source.shape == (1, preprocessing.height, preprocessing.width, 3):
            source = source[0]
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise Refused(
                "bad-image",
                "got an array of {} and shape {}, expected uint8 (height, width, 3) in RGB".format(source.dtype, source.shape),
            )
        if source.shape[:2] == (preprocessing.height, preprocessing.width):
            return source
        what = "an array of {} × {}, where the model takes {} × {},".format(
            source.shape[1], source.shape[0], preprocessing.width, preprocessing.height
        )
        image = _pillow(what).fromarray(np.ascontiguousarray(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        image = _decode(bytes(source))
    elif hasattr(source, "convert") and hasattr(source, "size"):
        image = source.convert("RGB")
    else:
        raise Refused("bad-image", "got {}, expected a path, bytes, an array or a Pillow image".format(type(source).__name__))
    return np.asarray(fit_image(image, preprocessing))


def _read_file(path: str) -> Any:
    """An array for an ``.npy`` file, bytes for any other."""
    import numpy as np

    try:
        if not path.lower().endswith(".npy"):
            with open(path, "rb") as f:
                return f.read()
        return np.load(path, allow_pickle=False)
    except OSError as e:
        raise Refused("bad-image", "{}: {}".format(path, e.strerror or e)) from e
    except (ValueError, EOFError) as e:
        raise Refused("bad-image", "{} is not an .npy file: {}".format(path, e)) from e


def _pillow(what: str) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise Refused("no-pillow", "{} needs Pillow, which this Python cannot import: {}".format(what, e), PILLOW_HINT) from e
    return Image


def _decode(data: bytes) -> Any:
    Image = _pillow("a picture in a file")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > MAX_PICTURE_PIXELS:
                raise Refused("bad-image", "{} × {} pixels, at most {:,} are decoded".format(width, height, MAX_PICTURE_PIXELS))
            return opened.convert("RGB")
    except Refused:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Refused("bad-image", "not a picture that Pillow can read: {}".format(e)) from e


def fit_image(image: Any, p: wire.Preprocessing) -> Any:
    """A Pillow RGB image → one of (width, height), as timm's evaluation transform does it."""
    Image = _pillow("resizing")
    resample = getattr(getattr(Image, "Resampling", Image), p.interpolation.upper())  # Pillow before 9.1 has no Resampling
    width, height = image.size
    if p.crop_mode == "squash":
        size = (p.resize_short, p.resize_short)
    elif p.crop_mode == "border":
        ratio = max(height / p.resize_short, width / p.resize_short)
        size = (round(width / ratio), round(height / ratio))
    else:
        long = int(p.resize_short * max(width, height) / min(width, height))
        size = (p.resize_short, long) if width <= height else (long, p.resize_short)
    try:
        image = image.resize(size, resample)
    except ValueError as e:  # a picture so narrow that nothing is left of it
        raise Refused("bad-image", "{} × {} pixels cannot be resized: {}".format(width, height, e)) from e
    fill = tuple(round(255 * v) for v in p.mean) if p.crop_mode == "border" else (0, 0, 0)
    return _crop_or_pad(Image, image, p.width, p.height, fill)


def _crop_or_pad(Image: Any, image: Any, width: int, height: int, fill: Tuple[int, ...]) -> Any:
    if image.width < width or image.height < height:
        left, top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
        canvas.paste(image, (left, top))
        image = canvas
    x, y = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((x, y, x + width, y + height))
