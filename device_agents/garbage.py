"""What may go from this device: ``gc foresee-gc uninstall``."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import stat
import time
from typing import Any, Callable, Dict, Iterable, Optional, Set, Tuple

from device_agents import wire
from device_agents.activate import read_active
from device_agents.console import Console
from device_agents.errors import Refused
from device_agents.intake import locked_blobs
from device_agents.root import SHA256, TEMP_PREFIX
from device_agents.store import Store
from device_agents.verify import parse_manifest

OLD_PART_S = 7 * 86_400.0
OLD_MARK_S = 90 * 86_400.0
MOST_BUNDLES = 10_000


def foresee_garbage(store: Store, console: Console) -> Dict[str, Any]:
    """What :func:`collect_garbage` would remove once the bundle of the manifest that is read is active; nothing is changed."""
    request = console.read_json("foresee-gc", 2 * wire.MAX_MANIFEST_BYTES)
    try:
        data = base64.b64decode(request["manifest"], validate=True)
    except (TypeError, KeyError, ValueError) as e:
        raise Refused("bad-request", "foresee-gc: expected an object with the manifest in base64: {}".format(e)) from e
    coming, activating = parse_manifest(data), hashlib.sha256(data).hexdigest()
    kept = _needed_bundles(store, activating, {coming.name: (coming.version, activating)})
    doomed = [d for d in store.bundle_digests() if d not in kept]
    needed = _blobs_of(store, kept) | {blob.sha256 for blob in coming.blobs()}
    sizes = [size for sha256, size in store.inventory().items() if sha256 not in needed]
    return {"removed_bundles": len(doomed), "removed_blobs": len(sizes), "freed_bytes": sum(sizes)}


def collect_garbage(store: Store, console: Console) -> Dict[str, Any]:
    """Remove bundles that are neither active, previous, newest of their name nor in a queued job, and blobs nobody needs."""
    with locked_blobs(store, console), console.heartbeat():
        store.clean_temporaries()
        kept = _needed_bundles(store)
        doomed = [d for d in store.bundle_digests() if d not in kept]
        for digest in doomed:
            store.remove_bundle(digest)
        needed = _blobs_of(store, kept)
        removed, freed = _remove_blobs(store, [sha256 for sha256 in store.inventory() if sha256 not in needed])
        _remove_made(store, lambda sha256: sha256 not in needed)
        freed += _remove_old(store)
    return {"removed_bundles": len(doomed), "removed_blobs": removed, "freed_bytes": freed}


def uninstall(store: Store, console: Console) -> Dict[str, Any]:
    """Remove the bundles that are named and the blobs that only they have: the inverse of ``install``. What is active, previous
    or in a queued job stays. Naming one that is not there is harmless."""
    request = console.read_json("uninstall")
    named = request.get("bundles") if isinstance(request, dict) else None
    if not isinstance(named, list) or not all(isinstance(d, str) and SHA256.fullmatch(d) for d in named):
        raise Refused("bad-request", 'uninstall: expected {"bundles": [digest, …]}')
    if len(named) > MOST_BUNDLES:
        raise Refused("bad-request", "uninstall: {:,} bundles, at most {:,}".format(len(named), MOST_BUNDLES))
    with locked_blobs(store, console), console.heartbeat():
        used = _used_bundles(store)
        installed = set(store.bundle_digests())
        doomed = [d for d in dict.fromkeys(named) if d in installed and d not in used]
        alone = _blobs_of(store, doomed) - _blobs_of(store, installed.difference(doomed))
        for digest in doomed:
            store.remove_bundle(digest)
        removed, freed = _remove_blobs(store, alone)
        _remove_made(store, lambda sha256: sha256 in alone)
    return {"removed_bundles": len(doomed), "removed_blobs": removed, "freed_bytes": freed}


def _remove_blobs(store: Store, doomed: Iterable[str]) -> Tuple[int, int]:
    """(how many there were, their bytes)."""
    sizes = store.inventory()
    gone = [sizes[sha256] for sha256 in doomed if sha256 in sizes and store.remove(store.blob_path(sha256))]
    return len(gone), sum(gone)


def _remove_made(store: Store, doomed: Callable[[str], bool]) -> None:
    """What was made here of artifacts that go: compiled engines, and what was counted of their answers."""
    for folder in ("engines", "accuracy"):
        for name in store.names_in(folder):
            if not name.startswith(TEMP_PREFIX) and doomed(name.partition("-")[0]):
                store.discard(store.root / folder / name)


def _blobs_of(store: Store, bundles: Iterable[str]) -> Set[str]:
    needed: Set[str] = set()
    for digest in bundles:
        needed.update(b.sha256 for b in parse_manifest(store.bundle_bytes(digest)[0]).blobs())
    return needed


def _used_bundles(store: Store, activating: str = "") -> Set[str]:
    """What is active, was before it, or stands in a queued job; ``activating``: as it will be once that bundle is active and
    today's active one the previous."""
    used: Set[str] = {activating}
    state = read_active(store)
    replaced = state is not None and activating not in ("", state.active.variant.bundle)
    for active in (state.active, None if replaced else state.previous) if state else ():
        if active is not None:
            used.add(active.variant.bundle)
    for run_id in store.queued():
        data = store.read(store.queue_path(run_id), wire.MAX_JOB_BYTES)
        with contextlib.suppress(wire.WireError):
            used.update(v.bundle for v in wire.loads(wire.Job, data or b"", "job", wire.MAX_JOB_BYTES).variants)
    return used


def _needed_bundles(store: Store, activating: str = "", coming: "Optional[Dict[str, Tuple[int, str]]]" = None) -> Set[str]:
    """What is used, and the newest of each name. ``coming``: (version, digest) by name of what is not installed yet."""
    installed = set(store.bundle_digests())
    newest = dict(coming or {})
    for digest in installed:
        with contextlib.suppress(Refused):
            manifest = parse_manifest(store.bundle_bytes(digest)[0])
            newest[manifest.name] = max(newest.get(manifest.name, (0, "")), (manifest.version, digest))
    return (_used_bundles(store, activating) | {digest for _, digest in newest.values()}) & installed


def _remove_old(store: Store) -> int:
    """Parts that nobody resumed for a week, and marks of runs that came home a season ago."""
    freed = 0
    for folder, suffix, limit in (("blobs", ".part", OLD_PART_S), ("spool", ".acked", OLD_MARK_S)):
        for name in sorted(os.listdir(str(store.root / folder))):
            path = store.root / folder / name
            with contextlib.suppress(OSError):
                info = path.lstat()
                if name.endswith(suffix) and stat.S_ISREG(info.st_mode) and time.time() - info.st_mtime > limit:
                    path.unlink()
                    freed += info.st_size
    return freed
