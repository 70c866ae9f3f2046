"""From uint8 pixels to the array that an artifact takes, and the ``.npy`` files both come in. Needs numpy."""

from __future__ import annotations

import math
import os
import re
from typing import Any, Tuple

from device_agents import wire
from device_agents.errors import Refused
from device_agents.store import Store


def prepare(images: Any, preprocessing: wire.Preprocessing, spec: wire.TensorSpec) -> Any:
    """uint8 (N, H, W, 3) → an array of the input's dtype and layout.

    ``uint8`` inputs take the pixels as they are (the model normalises); float inputs take (x / 255 − mean) / std, computed in
    float32. Raises ``bad-manifest`` for a dtype nothing is defined for.
    """
    import numpy as np

    if spec.dtype == "uint8":
        x = images
    elif spec.dtype in ("float32", "float16"):
        mean = np.array(preprocessing.mean, np.float32)
        std = np.array(preprocessing.std, np.float32)
        x = (images.astype(np.float32) / np.float32(255) - mean) / std
    else:
        raise Refused("bad-manifest", "no preparation is defined for an input of dtype {}".format(spec.dtype))
    if spec.layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x.astype(spec.dtype, copy=False))


MAX_HEADER_BYTES = 4096
_HEADER = re.compile(
    r"\{'descr': '([<|=]?[a-z]\d{1,2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,15}, ?)*(?:\d{1,15})?),?\),? *\} *\n"
)
_DTYPES = ("|u1", "<f4", "<f8", "<f2", "<i8", "<i4", "|i1")


def read_npy_header(data: bytes, what: str) -> Tuple[str, bool, Tuple[int, ...], int]:
    """(dtype, whether in Fortran order, shape, where the values begin) of an ``.npy`` file's first bytes; ``blob-damaged``.

    numpy reads the header as Python source: damaged ones make it raise whatever a tokenizer can. The format is fixed
    (numpy.lib.format, versions 1.0 and 2.0), and arrays of numbers are all that is ever sent.
    """
    start = {b"\x01\x00": 10, b"\x02\x00": 12}.get(data[6:8])
    if data[:6] != b"\x93NUMPY" or start is None:
        raise Refused("blob-damaged", "{} is not an .npy file of version 1 or 2: it begins with {!r}".format(what, data[:8]))
    end = start + int.from_bytes(data[8:start], "little")
    found = _HEADER.fullmatch(data[start:end].decode("latin-1")) if end <= MAX_HEADER_BYTES else None
    if found is None or len(data) < end:
        raise Refused("blob-damaged", "{}: the .npy header is damaged: {!r}".format(what, data[start : start + 100]))
    dtype, fortran, numbers = found.groups()
    if dtype not in _DTYPES:
        raise Refused("blob-damaged", "{}: values of type {}, expected one of {}".format(what, dtype, ", ".join(_DTYPES)))
    return dtype, fortran == "True", tuple(int(n) for n in numbers.split(",") if n.strip()), end


def parse_npy(data: bytes, what: str) -> Any:
    """The array in the bytes of an ``.npy`` file; never a pickle. Raises ``blob-damaged``."""
    import numpy as np

    dtype, fortran, shape, start = read_npy_header(data, what)
    count = math.prod(shape)
    if len(data) - start != count * np.dtype(dtype).itemsize:
        raise Refused(
            "blob-damaged",
            "{}: {:,} bytes of values, its header says {} of shape {}".format(what, len(data) - start, dtype, shape),
        )
    values = np.frombuffer(data, dtype, count, start)
    return values.reshape(shape, order="F" if fortran else "C")


def load_images(store: Store, blob: wire.Blob, count: int, preprocessing: wire.Preprocessing, what: str) -> Any:
    """uint8 (count, H, W, 3) from a blob, mapped and not read, so a large set needs no memory. Raises ``blob-damaged``."""
    import numpy as np

    with os.fdopen(store.open_blob(blob), "rb") as f:
        try:
            dtype, fortran, shape, start = read_npy_header(f.read(MAX_HEADER_BYTES), what)
            expected = (count, preprocessing.height, preprocessing.width, 3)
            if dtype != "|u1" or fortran or shape != expected:
                raise Refused(
                    "blob-damaged", "{}: {} of shape {}, expected uint8 of shape {}".format(what, dtype, shape, expected)
                )
            return np.memmap(f, np.uint8, "r", start, shape)
        except (ValueError, OSError) as e:
            raise Refused("blob-damaged", "{} is not an .npy file: {}".format(what, e)) from e


def batches(count: int, batch: int) -> Any:
    """(indices into the images, how many of them count): the last batch is filled up with its last image."""
    import numpy as np

    for start in range(0, count, batch):
        real = min(batch, count - start)
        yield np.minimum(np.arange(start, start + batch), count - 1), real
