"""What bundles add to a page: the share of multiply-adds in int8, class names, and the images that variants dispute.

The results store holds what was measured; what a file is made of stands in its bundle's manifest.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from device_agents.wire import Artifact
from edgevit.data import import_imaging
from edgevit.errors import BundleError
from edgevit.report.page_rows import short

if TYPE_CHECKING:
    from edgevit.bundle import Bundle

THUMBNAIL = 72
"""Pixels a side, at most."""
MOST_FLOATS = 8


@dataclass(frozen=True)
class FromBundles:
    """``coverage``: SHA-256 of an artifact → what of it runs in which precision. ``names``: digest of a bundle → class names.
    ``evaluation``: digest of a bundle → the bundle, where it carries labelled images."""

    coverage: Mapping[str, dict[str, Any]]
    names: Mapping[str, tuple[str, ...]]
    evaluation: Mapping[str, Bundle]


NOTHING = FromBundles({}, {}, {})


def read_bundles(bundles: Sequence[Bundle]) -> FromBundles:
    """What the page takes of them. BundleError where the labels of one cannot be read."""
    coverage = {a.blob.sha256: _placed(a) for b in bundles for a in b.manifest.artifacts}
    names = {b.digest: tuple(_labels(b)) for b in bundles if b.manifest.labels}
    return FromBundles(coverage, names, {b.digest: b for b in bundles if b.manifest.evaluation})


def _labels(bundle: Bundle) -> list[str]:
    blob = bundle.manifest.labels
    if blob is None:
        return []
    try:
        found = json.loads(bundle.blob_path(blob.sha256).read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise BundleError(f"{bundle.path}: the class names cannot be read: {e}", hint=f"edgevit verify {bundle.path}") from e
    return [str(name) for name in found]


def _placed(a: Artifact) -> dict[str, Any]:
    p = a.placement
    if p is None:
        return {"absent": "the bundle was built before placement was recorded; build it again"}
    floats = sorted(p.float_operators.items(), key=lambda item: (-item[1], item[0]))
    return {
        "runtime": f"{p.runtime} {p.runtime_version}",
        "macs": p.macs,
        "int8": short(100 * p.int8_share),
        "int4": short(100 * p.int4_share),
        "floats": [list(item) for item in floats[:MOST_FLOATS]],
        "nodes": dict(p.nodes),
        "outside": dict(p.outside),
        "partitions": p.partitions,
        "leftover": p.leftover_pairs,
        "activations": p.activation_bytes,
    }


def thumbnails(bundle: Bundle, images: Sequence[int]) -> dict[str, str]:
    """Image number → a small JPEG as a data URI, of the bundle's evaluation images (uint8 NHWC); numbers beyond are left
    out. MissingExtra without what reads them, BundleError where they cannot be read."""
    np, image = import_imaging()
    held = bundle.manifest.evaluation
    if held is None:
        return {}
    found = {}
    try:
        pixels = np.load(bundle.blob_path(held.images.sha256), mmap_mode="r", allow_pickle=False)
        for i in (i for i in images if i < len(pixels)):
            picture = image.fromarray(np.ascontiguousarray(pixels[i]))
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=80)
            found[str(i)] = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    except (OSError, ValueError, TypeError) as e:
        raise BundleError(
            f"{bundle.path}: its evaluation images cannot be shown: {e}", hint=f"edgevit verify {bundle.path}"
        ) from e
    return found
