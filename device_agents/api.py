"""For applications on the device: the active bundle, loaded, and loaded anew when another one becomes active.

    from edgevit_device import load_active      # see docs/applications.md

    model = load_active()
    for guess in model.classify("photo.jpg"):
        print(guess.label, guess.probability)

Everything goes by what the bundle says: preprocessing, class names, the variant that was chosen for this device. Errors are
:class:`~device_agents.errors.Refused`, with a stable ``code``, and a ``hint`` of what to do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

# All of it at once: the agent's file may be replaced while an application of months ago still runs from it.
from device_agents import wire
from device_agents.activate import read_active
from device_agents.answers import parse_label_names, rank_classes
from device_agents.errors import Refused
from device_agents.install import artifact_of
from device_agents.pictures import load_picture
from device_agents.pixels import batches, prepare
from device_agents.runtimes import check_scheme, infer, load_backend
from device_agents.runtimes import onnx as _onnx  # noqa: F401
from device_agents.runtimes import tflite as _tflite  # noqa: F401
from device_agents.store import Store
from device_agents.verify import parse_manifest

__all__ = ["ActiveModel", "Prediction", "Refused", "describe_active", "load_active"]

ACTIVE_SCHEMA = "edgevit.active/1"
ATTEMPTS = 5
"""A deployment may replace what is active, and collect what was, between reading its name and reading its files."""

_log = logging.getLogger("edgevit")

Seen = Optional[Tuple[int, int, int]]
"""What tells one ``active.json`` from the next: it is replaced by renaming another file onto it."""


@dataclass(frozen=True)
class Prediction:
    """One class: its name (empty where the bundle has none), its probability, its number, and the digest of the bundle."""

    label: str
    probability: float
    index: int
    bundle: str


@dataclass(frozen=True)
class _Loaded:
    """One variant in memory. Runtimes' sessions are not all safe to call from two threads, so each call holds ``lock``."""

    active: wire.Active
    artifact: wire.Artifact
    preprocessing: wire.Preprocessing
    names: Tuple[str, ...]
    run: Callable[[Any], Any]
    lock: threading.Lock


def load_active(root: Union[str, "os.PathLike[str]"] = "~/.edgevit", automatic: bool = True) -> "ActiveModel":
    """The active bundle of the agent at ``root``. ``automatic``: follow later activations by itself.

    Raises :class:`Refused`: ``no-active`` where nothing was activated yet, ``no-numpy`` or ``no-runtime`` where this Python is
    not the provisioned one (``ROOT/venv/bin/python``), ``blob-missing``, ``blob-damaged``, ``provider-mismatch``, ``io-error``.
    """
    return ActiveModel(Path(root).expanduser(), automatic)


class ActiveModel:
    """What :func:`load_active` gives. May be used from several threads.

    Before each answer it looks whether ``active.json`` was replaced (one ``stat``) and, if so, loads the new variant in the
    thread that noticed, while others go on with the old one. An activation that cannot be loaded leaves the old variant at
    work: ``problem`` then says why (a text, else empty), and the logger ``edgevit`` warns once. :meth:`reload` raises instead.
    """

    def __init__(self, root: Path, automatic: bool = True) -> None:
        self._store = Store(root)
        self._automatic = automatic
        self._lock = threading.Lock()
        self.problem = ""
        self._seen, self._current = _load_current(self._store, None)

    @property
    def active(self) -> wire.Active:
        """Which variant of which bundle answers now: ``bundle_name``, ``bundle_version``, ``variant``."""
        return self._current.active

    @property
    def labels(self) -> Tuple[str, ...]:
        """The class names of the bundle, in the order of the classes."""
        return self._current.names

    @property
    def size(self) -> Tuple[int, int]:
        """(height, width) in pixels of what the model takes. An array of this size is taken as it is."""
        return self._current.preprocessing.height, self._current.preprocessing.width

    def classify(self, image: Any, top: int = 5) -> List[Prediction]:
        """The ``top`` likeliest classes of one image, likeliest first.

        ``image``: a path (``.npy``; JPEG, PNG and whatever else Pillow reads), the bytes of such a picture, a Pillow image, or
        an array uint8 (H, W, 3) in RGB, which is taken as it is where it has the model's own size and is else resized and
        cropped like a file. Raises :class:`Refused`: ``no-pillow``, ``bad-image``, ``worker-failed``.
        """
        return self.classify_many([image], top)[0]

    def classify_many(self, images: Iterable[Any], top: int = 5) -> List[List[Prediction]]:
        """The same of several images, of one and the same bundle, in as few calls of the model as its batch size allows."""
        import numpy as np

        loaded = self._follow()
        pictures = [load_picture(image, loaded.preprocessing) for image in images]
        if not pictures:
            return []
        stacked = np.stack(pictures)
        found = []
        for index, real in batches(len(pictures), loaded.artifact.batch):
            x = prepare(stacked[index], loaded.preprocessing, loaded.artifact.input)
            with loaded.lock:
                answer = infer(loaded.run, x)
            found.append(np.asarray(answer, np.float32).reshape(loaded.artifact.batch, -1)[:real])
        ranked = rank_classes(np.concatenate(found), loaded.names, top)
        bundle = loaded.active.variant.bundle
        return [[Prediction(c["label"], c["probability"], c["index"], bundle) for c in row] for row in ranked]

    def reload(self) -> bool:
        """Load what is active now; whether that is another variant than before. Raises :class:`Refused` where it cannot be
        loaded; the old variant stays at work then."""
        with self._lock:
            before = self._current.active
            self._seen, self._current = _load_current(self._store, self._current)
            self.problem = ""
            return self._current.active.variant != before.variant

    def _follow(self) -> _Loaded:
        if self._automatic and _look(self._store) != self._seen and self._lock.acquire(blocking=False):
            try:
                seen = _look(self._store)
                try:
                    self._seen, self._current = _load_current(self._store, self._current)
                    self.problem = ""
                except Refused as e:
                    self._seen = seen  # tried: not again before something else is activated
                    self.problem = "{}: {}".format(e.code, e)
                    _log.warning("what was activated cannot be loaded, the version before goes on: %s", self.problem)
            finally:
                self._lock.release()
        return self._current


def describe_active(store: Store) -> Dict[str, Any]:
    """Where the files of the active variant lie, for applications in other languages. Raises ``no-active``.

    ``labels`` is None where the bundle has no class names. The files never change; what is active may: ask again to follow.
    """
    active = _active_of(store)
    manifest = _manifest_of(store, active)
    artifact = artifact_of(manifest, active.variant)
    return {
        "schema": ACTIVE_SCHEMA,
        "bundle": active.variant.bundle,
        "name": active.bundle_name,
        "version": active.bundle_version,
        "activated_at": active.activated_at,
        "artifact": artifact.name,
        "format": artifact.format,
        "runtime": active.variant.runtime,
        "provider": active.variant.provider,
        "threads": active.variant.threads,
        "model": str(store.blob_path(artifact.blob.sha256)),
        "labels": str(store.blob_path(manifest.labels.sha256)) if manifest.labels else None,
        "manifest": str(store.bundle_folder(active.variant.bundle) / "manifest.json"),
        "batch": artifact.batch,
        "input": wire.encode(artifact.input),
        "output": wire.encode(artifact.output),
        "preprocessing": wire.encode(manifest.preprocessing),
    }


def _active_of(store: Store) -> wire.Active:
    state = read_active(store)
    if state is None:
        raise Refused(
            "no-active",
            "nothing is active at {}".format(store.root),
            "on the host: edgevit deploy BUNDLE TARGET --select fastest",
        )
    return state.active


def _manifest_of(store: Store, active: wire.Active) -> wire.Manifest:
    """Its signature was verified when it was installed and when it was activated; its digest is what the activation names."""
    data, _ = store.bundle_bytes(active.variant.bundle)
    digest = hashlib.sha256(data).hexdigest()
    if digest != active.variant.bundle:
        raise Refused(
            "blob-damaged", "bundle {} holds another manifest: {}".format(active.variant.bundle, digest), "deploy it again"
        )
    return parse_manifest(data)


def _look(store: Store) -> Seen:
    try:
        info = os.stat(str(store.active_path))
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _load_current(store: Store, known: Optional[_Loaded]) -> "Tuple[Seen, _Loaded]":
    """(what ``active.json`` looked like, the variant it names); what ``known`` holds is not loaded again."""
    for _ in range(ATTEMPTS - 1):
        seen = _look(store)
        try:
            return seen, _load(store, _active_of(store), known)
        except Refused:
            if _look(store) == seen:
                raise
    return _look(store), _load(store, _active_of(store), known)


def _load(store: Store, active: wire.Active, known: Optional[_Loaded]) -> _Loaded:
    if known is not None and known.active.variant == active.variant:
        return replace(known, active=active)
    manifest = _manifest_of(store, active)
    variant = active.variant
    artifact = artifact_of(manifest, variant)
    check_scheme(variant.runtime, artifact.scheme)
    backend = load_backend(variant.runtime)
    model = _read(store, artifact.blob)
    names = parse_label_names(_read(store, manifest.labels)) if manifest.labels else ()
    backend.check(model)
    session = backend.load(model, variant.provider, variant.threads, artifact, store.engines_folder(artifact.blob.sha256))
    if session.provider != variant.provider:
        raise Refused("provider-mismatch", "asked for {}, got {}".format(variant.provider, session.provider))
    return _Loaded(active, artifact, manifest.preprocessing, names, session.run, threading.Lock())


def _read(store: Store, blob: wire.Blob) -> bytes:
    data = store.read_blob(blob)
    got = hashlib.sha256(data).hexdigest()
    if got != blob.sha256:
        raise Refused(
            "blob-damaged", "blob {} holds other bytes: their SHA-256 is {}".format(blob.sha256, got), "deploy it again"
        )
    return data
