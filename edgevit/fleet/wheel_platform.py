"""Which wheels a device can load, and which of their dependencies concern it: tags and markers from its Facts. Pure.

pip and ``packaging`` know both for the machine they run on. Here the same rules (PEP 425, 508, 600, 656) are applied to what a
device said of itself; the tests hold them against ``packaging`` on the machine they run on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from device_agents.wire import Facts
from edgevit.errors import NotProvisioned

LEGACY_MANYLINUX = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
"""glibc 2.x → the name that wheels for it had before PEP 600."""

OLDEST_GLIBC = {"x86_64": 5, "i686": 5}
"""The oldest 2.x that manylinux knows; 17 on every other machine."""

_SOABI = re.compile(r"(?P<implementation>[a-z]+)-?(?P<version>\d+)(?P<flags>[a-z]*)(-pp\d+)?-(?P<machine>[a-z0-9_]+)-.*")
_MACHINE_OF_SOABI = {"i386": "i686", "powerpc64le": "ppc64le"}


@dataclass(frozen=True)
class WheelPlatform:
    """One kind of Python on one kind of machine. ``machine`` is what its Python was built for, ``kernel_machine`` what the
    kernel is for: a Raspberry Pi often has a 32-bit system under a 64-bit kernel. ``abi`` such as ``cp311``; ``libc``:
    ``glibc``, ``musl`` or empty where unknown."""

    python: str
    abi: str
    machine: str
    kernel_machine: str
    kernel: str
    libc: str
    libc_version: tuple[int, int]

    @property
    def minor(self) -> tuple[int, int]:
        return _minor(self.python)

    def __str__(self) -> str:
        libc = f"{self.libc} {self.libc_version[0]}.{self.libc_version[1]}" if self.libc else "an unknown C library"
        flavour = ", free-threaded" if self.abi.endswith("t") else ""
        return f"Python {self.minor[0]}.{self.minor[1]}{flavour} on {self.machine} with {libc}"


def platform_of(target: str, facts: Facts) -> WheelPlatform:
    """The platform of a device. NotProvisioned where its Python is no CPython: the runtimes have no wheels for others."""
    found = _SOABI.fullmatch(facts.soabi or "")
    major, minor = _minor(facts.python)
    abi, machine = f"cp{major}{minor}", facts.machine
    if found is not None:
        if found["implementation"] != "cpython":
            raise NotProvisioned(
                f"{target}: its Python is {facts.soabi}; the runtimes have wheels for CPython alone",
                hint="sudo apt install python3 there, then edgevit target add … --python /usr/bin/python3",
            )
        # Since 3.8 a debug build loads what the ordinary one loads; a free-threaded one does not.
        abi += "t" if "t" in found["flags"] else ""
        machine = _MACHINE_OF_SOABI.get(found["machine"], found["machine"])
        if machine == "arm":
            machine = "armv6l" if facts.machine == "armv6l" else "armv7l"
    libc, _, version = (facts.libc or "").partition(" ")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if libc not in ("glibc", "musl") or numbers is None:
        return WheelPlatform(facts.python, abi, machine, facts.machine, facts.kernel, "", (0, 0))
    return WheelPlatform(
        facts.python, abi, machine, facts.machine, facts.kernel, libc, (int(numbers.group(1)), int(numbers.group(2)))
    )


def platform_tags(platform: WheelPlatform) -> list[str]:
    """Every platform tag this device accepts, best first: newest C library first, legacy names beside their PEP 600 twins."""
    machine = platform.machine
    # A 32-bit Arm Python under a 64-bit kernel is "armv8l" to itself, and loads armv7l as well.
    below_64 = machine == "armv7l" and platform.kernel_machine == "aarch64"
    machines = ["armv8l", "armv7l"] if below_64 else [machine]
    tags: list[str] = []
    major, minor = platform.libc_version
    if platform.libc == "glibc" and major == 2 and machine != "armv6l":
        for n in range(minor, OLDEST_GLIBC.get(machine, 17) - 1, -1):
            tags += [f"manylinux_2_{n}_{m}" for m in machines]
            if n in LEGACY_MANYLINUX:
                tags += [f"{LEGACY_MANYLINUX[n]}_{m}" for m in machines]
    elif platform.libc == "musl" and machine != "armv6l":
        tags += [f"musllinux_{major}_{n}_{m}" for m in machines for n in range(minor, -1, -1)]
    return tags + [f"linux_{m}" for m in machines]


def wheel_tags(platform: WheelPlatform) -> list[Tag]:
    """Every tag of a wheel that this device accepts, best first."""
    platforms = platform_tags(platform)
    interpreter = f"cp{platform.minor[0]}{platform.minor[1]}"
    found = list(cpython_tags(platform.minor, abis=[platform.abi], platforms=platforms))
    return found + list(compatible_tags(platform.minor, interpreter=interpreter, platforms=platforms))


def markers(platform: WheelPlatform) -> dict[str, str]:
    """The device's values of every environment marker (PEP 508), so that none is taken from this machine."""
    major, minor = platform.minor
    return {
        "implementation_name": "cpython",
        "implementation_version": platform.python,
        "os_name": "posix",
        "platform_machine": platform.kernel_machine,
        "platform_python_implementation": "CPython",
        "platform_release": platform.kernel,
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": platform.python,
        "python_version": f"{major}.{minor}",
        "sys_platform": "linux",
        "extra": "",
    }


def explain_absence(platform: WheelPlatform, name: str, specifier: str, filenames: Iterable[str]) -> str:
    """Why none of an index's wheels of a package fits, and which Pythons, C libraries and machines have one."""
    wanted = f"no wheel of {name}{specifier} for {platform}"
    wheels = _tags_by_wheel(name, SpecifierSet(specifier), filenames)
    if not wheels:
        return f"{wanted}; there is no wheel of it at all"
    floors: dict[str, tuple[str, int, int]] = {}
    for tags in wheels:
        here = [t for t in tags if _machine_of(t.platform) in (platform.machine, "any")]
        for tag in here:
            for python in _pythons_of(tag):
                floors[python] = min(floors.get(python, ("~", 0, 0)), min(_libc_of(t.platform) for t in here))
    if not floors:
        machines = sorted({_machine_of(t.platform) for tags in wheels for t in tags} - {""})
        return f"{wanted}; there are wheels for {', '.join(machines) or 'other systems'}"
    groups: dict[tuple[str, int, int], list[str]] = {}
    for python in sorted(floors, key=_by_number):
        groups.setdefault(floors[python], []).append(python)
    named = [
        f"Python {', '.join(pythons)}" + (f" ({libc} {major}.{minor} or newer)" if libc else "")
        for (libc, major, minor), pythons in sorted(groups.items())
    ]
    return f"{wanted}; on {platform.machine} there are for {'; '.join(named)}"


def _tags_by_wheel(name: str, specifier: SpecifierSet, filenames: Iterable[str]) -> list[frozenset[Tag]]:
    found = []
    for filename in sorted(set(filenames)):
        try:
            package, version, _, tags = parse_wheel_filename(filename)
        except InvalidWheelFilename:
            continue  # indexes still list names from before there were rules
        if package == canonicalize_name(name) and specifier.contains(version):
            found.append(tags)
    return found


def _machine_of(platform_tag: str) -> str:
    if platform_tag == "any":
        return "any"
    found = re.fullmatch(r"(?:manylinux\d+|manylinux_\d+_\d+|musllinux_\d+_\d+|linux)_(\w+)", platform_tag)
    return found.group(1) if found else ""


def _libc_of(platform_tag: str) -> tuple[str, int, int]:
    """(C library, its lowest version), the library empty where any does."""
    found = re.match(r"(many|musl)linux_(\d+)_(\d+)_", platform_tag)
    if found:
        return ("glibc" if found.group(1) == "many" else "musl", int(found.group(2)), int(found.group(3)))
    for minor, legacy in LEGACY_MANYLINUX.items():
        if platform_tag.startswith(f"{legacy}_"):
            return ("glibc", 2, minor)
    return ("", 0, 0)


def _pythons_of(tag: Tag) -> set[str]:
    found = re.fullmatch(r"(cp|py)(\d)(\d*)", tag.interpreter)
    if found is None:
        return set()
    version = f"{found.group(2)}.{found.group(3)}" if found.group(3) else found.group(2)
    return {f"{version} or newer" if tag.abi == "abi3" else version + ("t" if tag.abi.endswith("t") else "")}


def _by_number(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def _minor(python: str) -> tuple[int, int]:
    major, minor = python.split(".")[:2]
    return int(major), int(minor)
