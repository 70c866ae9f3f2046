"""From uint8 pixels to the array that an artifact takes, and the ``.npy`` files both come in. Needs numpy."""

from __future__ import annotations

import io
import os
from typing import Any

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


def parse_npy(data: bytes, what: str) -> Any:
    """The array in the bytes of an ``.npy`` file; never a pickle. Raises ``blob-damaged``."""
    import numpy as np

    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise Refused("blob-damaged", "{} is not an .npy file: {}".format(what, e)) from e


def load_images(store: Store, blob: wire.Blob, count: int, preprocessing: wire.Preprocessing, what: str) -> Any:
    """uint8 (count, H, W, 3) from a blob, mapped and not read, so a large set needs no memory. Raises ``blob-damaged``."""
    import numpy as np

    with os.fdopen(store.open_blob(blob), "rb") as f:
        try:
            version = np.lib.format.read_magic(f)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(f)
            expected = (count, preprocessing.height, preprocessing.width, 3)
            if dtype != np.uint8 or fortran or shape != expected:
                raise Refused(
                    "blob-damaged", "{}: {} of shape {}, expected uint8 of shape {}".format(what, dtype, shape, expected)
                )
            return np.memmap(f, np.uint8, "r", f.tell(), shape)
        except (ValueError, OSError) as e:
            raise Refused("blob-damaged", "{} is not an .npy file: {}".format(what, e)) from e


def batches(count: int, batch: int) -> Any:
    """(indices into the images, how many of them count): the last batch is filled up with its last image."""
    import numpy as np

    for start in range(0, count, batch):
        real = min(batch, count - start)
        yield np.minimum(np.arange(start, start + batch), count - 1), real
