"""The closed set of wheels that a device needs, resolved on this machine for the device.

``pip download --platform`` finds the right wheels when told every tag, but judges ``Requires-Dist`` markers by the machine it
runs on. So pip is asked for single packages, and what they require is read from their own metadata and judged with the device's
markers, until nothing is lacking. What was resolved is remembered: the same kind of device gets the same wheels for a day
without asking the index, and whenever the index cannot be reached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from edgevit.cache import Cache, Entry, digest_of
from edgevit.errors import NotProvisioned
from edgevit.fleet.wheel_index import FoundWheel, IndexUnreachable, NoWheel, read_wheel
from edgevit.fleet.wheel_platform import WheelPlatform, markers
from edgevit.progress import Progress

MAX_ROUNDS = 40
FRESH_S = 24 * 3600.0
_one_at_a_time = threading.Lock()


class Source(Protocol):
    """Where wheels come from."""

    def fetch(self, requirements: Sequence[str], platform: WheelPlatform, progress: Progress) -> list[FoundWheel]: ...


@dataclass(frozen=True)
class Wheelhouse:
    """Wheels that suit each other and one kind of device, by package. ``remembered``: when they were resolved, in seconds since
    1970, where that was not just now."""

    wheels: tuple[FoundWheel, ...]
    remembered: float | None = None

    @property
    def size(self) -> int:
        return sum(w.size for w in self.wheels)


@dataclass
class _Wanted:
    """Everything that is asked of one package, and by whom."""

    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    extras: set[str] = field(default_factory=set)
    by: list[str] = field(default_factory=list)


def resolve(
    roots: Iterable[str], platform: WheelPlatform, source: Source, given: Mapping[str, str], progress: Progress
) -> Wheelhouse:
    """The wheels of ``roots`` and of everything they require on this platform, one version of each.

    ``given``: packages that the device's system provides, with their versions; none is fetched, and none may be asked for in
    another version. :class:`NoWheel` names the package that is lacking, and who asks for it; there is no going back to older
    versions of a package because of what the newest requires.
    """
    wanted_by_root = tuple(roots)
    pins: dict[str, FoundWheel] = {}
    for _ in range(MAX_ROUNDS):
        wanted = _follow(wanted_by_root, platform, pins, given)
        lacking = {n: w for n, w in wanted.items() if n not in pins or not _accepts(w, str(pins[n].version))}
        if not lacking:
            return Wheelhouse(tuple(pins[n] for n in sorted(wanted)))
        try:
            fetched = source.fetch([f"{n}{w.specifier}" for n, w in sorted(lacking.items())], platform, progress)
        except NoWheel as e:
            by = ", ".join(lacking[e.package].by) if e.package in lacking else ""
            raise NoWheel(e.package, f"{e} (asked for by {by})" if by else str(e), hint=e.hint) from e
        found = {w.package: w for w in fetched}
        absent = sorted(set(lacking) - set(found))
        if absent:
            raise NoWheel(absent[0], f"pip brought no wheel of {', '.join(absent)} for {platform}")
        pins.update({n: found[n] for n in lacking})
    names = ", ".join(sorted(lacking))
    raise NotProvisioned(
        f"the requirements of {names} did not settle in {MAX_ROUNDS} rounds", hint="edgevit profiles show NAME"
    )


def _follow(
    roots: Sequence[str], platform: WheelPlatform, pins: Mapping[str, FoundWheel], given: Mapping[str, str]
) -> dict[str, _Wanted]:
    """What is asked for from ``roots`` on, through every wheel that is known already."""
    environment = markers(platform)
    wanted: dict[str, _Wanted] = {}
    queue = [(Requirement(root), "edgevit") for root in roots]
    followed: set[tuple[str, str]] = set()
    while queue:
        requirement, by = queue.pop(0)
        if requirement.url:
            raise NotProvisioned(
                f"{by} asks for {requirement}: an address instead of a version", hint="edgevit profiles show NAME"
            )
        name = canonicalize_name(requirement.name)
        if name in given:
            if not requirement.specifier.contains(given[name], prereleases=True):
                why = f"{by} asks for {requirement}, the board's own runtime needs {name} {given[name]} of the system"
                raise NoWheel(name, why)
            continue
        one = wanted.setdefault(name, _Wanted())
        one.specifier &= requirement.specifier
        one.extras |= requirement.extras
        if by not in one.by:
            one.by.append(by)
        if name not in pins:
            continue
        for extra in ("", *sorted(one.extras)):
            if (name, extra) in followed:
                continue
            followed.add((name, extra))
            for line in pins[name].requires:
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({**environment, "extra": extra}):
                    queue.append((inner, f"{name} {pins[name].version}"))
    return wanted


def _accepts(wanted: _Wanted, version: str) -> bool:
    return wanted.specifier.contains(version, prereleases=True)


def resolve_remembered(
    roots: Sequence[str],
    platform: WheelPlatform,
    source: Source,
    given: Mapping[str, str],
    progress: Progress,
    *,
    cache: Cache,
    upgrade: bool = False,
    now: float | None = None,
) -> Wheelhouse:
    """:func:`resolve`, unless the same was resolved within a day; an older result counts where the index does not answer.

    ``upgrade``: the index is asked in any case.
    """
    key = digest_of("wheelhouse/1", sorted(roots), dict(given), _identity(platform))
    at = time.time() if now is None else now
    with _one_at_a_time:  # several devices of one kind are provisioned at once: the first asks, the others find its answer
        entry = None if upgrade else cache.get(key)
        known = None if entry is None else _remembered(entry)
        if known is not None and known.remembered is not None and 0 <= at - known.remembered < FRESH_S:
            return known
        try:
            found = resolve(roots, platform, source, given, progress)
        except IndexUnreachable:
            if known is None:
                raise
            return known
        files = {w.filename: w.path for w in found.wheels}
        cache.put(key, files, {"resolved_at": at})
        return found


def _identity(platform: WheelPlatform) -> list[Any]:
    return [platform.python, platform.abi, platform.machine, platform.kernel_machine, platform.libc, *platform.libc_version]


def _remembered(entry: Entry) -> Wheelhouse | None:
    resolved_at = entry.meta.get("resolved_at")
    if not isinstance(resolved_at, (int, float)):
        return None
    return Wheelhouse(tuple(read_wheel(n, p, p.name) for n, p in sorted(entry.files.items())), float(resolved_at))
