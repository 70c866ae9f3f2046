"""Wheels from wherever the operator's own pip gets them, or from a folder: the one place that starts pip on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from edgevit.cache import Cache
from edgevit.errors import NotProvisioned
from edgevit.fleet.wheel_platform import WheelPlatform, explain_absence, platform_tags
from edgevit.progress import Progress

UNREACHABLE = re.compile(
    r"connection broken by|connection error:|Failed to establish a new connection|Max retries exceeded|ProxyError|timed out"
    r"|name resolution|problem confirming the ssl certificate|5\d\d Server Error|HTTP error 5\d\d|407 Proxy"
)
"""What pip says when an index did not answer. Its last line is then the same as for a package that has no wheel."""

_FAILED = re.compile(r"No matching distribution found for (.+)")
_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement .+ \(from versions: (.+)\)")
_WHEEL = re.compile(r"[\w.!+]+(?:-[\w.!+]+){4,5}\.whl")


class NoWheel(NotProvisioned):
    """A package has no wheel that fits the device; ``package`` is its name."""

    def __init__(self, package: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.package = package


class IndexUnreachable(NotProvisioned):
    """The package index did not answer."""


@dataclass(frozen=True)
class FoundWheel:
    """A wheel on this machine, known by its digest. ``unpacked`` in bytes; ``requires`` are its ``Requires-Dist``, unjudged."""

    filename: str
    path: Path
    sha256: str
    size: int
    unpacked: int
    requires: tuple[str, ...]

    @property
    def package(self) -> str:
        return parse_wheel_filename(self.filename)[0]

    @property
    def version(self) -> Version:
        return parse_wheel_filename(self.filename)[1]


def read_wheel(filename: str, path: Path, sha256: str) -> FoundWheel:
    """What a wheel's own metadata says. NotProvisioned where it is no wheel."""
    try:
        parse_wheel_filename(filename)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            (metadata,) = [i for i in infos if re.fullmatch(r"[^/]+\.dist-info/METADATA", i.filename)]
            headers = BytesHeaderParser().parsebytes(archive.read(metadata))
        requires = tuple(str(line) for line in headers.get_all("Requires-Dist", []))
        for line in requires:
            Requirement(line)
    except (InvalidWheelFilename, InvalidRequirement, ValueError, OSError, zipfile.BadZipFile) as e:
        raise NotProvisioned(f"{filename} is no wheel that can be read: {e}", hint=f"rm {path}; then provision again") from e
    size = path.stat().st_size
    return FoundWheel(filename, path, sha256, size, sum(i.file_size for i in infos), requires)


@dataclass(frozen=True)
class PipIndex:
    """pip with the operator's own configuration (index, proxy, certificates); or, with ``folder``, the wheels there alone.

    ``key``: under which progress is told."""

    cache: Cache
    folder: Path | None = None
    key: str = "wheels"

    def fetch(self, requirements: Sequence[str], platform: WheelPlatform, progress: Progress) -> list[FoundWheel]:
        """The newest wheel for each requirement, dependencies aside, kept in the cache by digest.

        :class:`NoWheel` with what exists instead, :class:`IndexUnreachable`, or NotProvisioned where pip itself fails.
        """
        with tempfile.TemporaryDirectory(prefix="edgevit-wheels-") as place:
            status, said = self._run(requirements, platform, Path(place), progress)
            if status != 0:
                raise self._explain(requirements, platform, said)
            found = []
            for path in sorted(Path(place).glob("*.whl")):
                sha256, _ = self.cache.add_blob(path)
                found.append(read_wheel(path.name, self.cache.blob_path(sha256), sha256))
            return found

    def _run(
        self, requirements: Sequence[str], platform: WheelPlatform, place: Path, progress: Progress | None, *more: str
    ) -> tuple[int, str]:
        """(pip's exit status, everything it said)."""
        python = ".".join(str(n) for n in platform.minor)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", *more]
        command += ["--disable-pip-version-check", "--no-input", "--dest", str(place)]
        command += ["--python-version", python, "--implementation", "cp", "--abi", platform.abi]
        # pip expands no manylinux tag for another machine: each one that the device accepts is named.
        command += [f"--platform={tag}" for tag in platform_tags(platform)]
        env = dict(os.environ, PIP_NO_COLOR="1", LC_ALL="C.UTF-8")
        if self.folder is not None:
            command += ["--no-index", "--find-links", str(self.folder)]
            env = {k: v for k, v in env.items() if k not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL")}
            env["PIP_CONFIG_FILE"] = os.devnull
        try:
            process = subprocess.Popen(
                [*command, "--", *requirements],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                text=True,
                errors="replace",
            )
        except OSError as e:
            raise NotProvisioned(f"pip cannot be started on this machine: {e}", hint=f"{sys.executable} -m ensurepip") from e
        lines: list[str] = []
        with process:
            for line in process.stdout or ():
                lines.append(line)
                if progress is not None and line.strip().startswith(("Downloading", "Using cached", "Collecting")):
                    progress.advance(self.key, 0.0, f"{self.key} for {platform}: {line.strip()[:70]}")
        return process.returncode, "".join(lines)

    def _explain(self, requirements: Sequence[str], platform: WheelPlatform, said: str) -> NotProvisioned:
        if "No module named pip" in said:
            return NotProvisioned(f"{sys.executable} has no pip", hint=f"{sys.executable} -m ensurepip")
        failed = _FAILED.search(said)
        try:
            wanted = Requirement(failed.group(1)) if failed else None
        except InvalidRequirement:
            wanted = None
        names: set[str] = set()
        account = said
        if wanted is not None and not UNREACHABLE.search(said):
            names, account = self._list(str(wanted), platform)
        broken = UNREACHABLE.search(account)
        if broken and not names:
            line = account[account.rfind("\n", 0, broken.start()) + 1 :].splitlines()[0].strip()
            hint = f"{sys.executable} -m pip config list; or give --wheelhouse DIR"
            return IndexUnreachable(f"the package index did not answer: {line[:400]}", hint=hint)
        if wanted is None:
            tail = "\n".join(said.strip().splitlines()[-6:])
            hint = f"{sys.executable} -m pip config list"
            return NotProvisioned(f"pip found no wheels for {', '.join(requirements)}:\n{tail}", hint=hint)
        where = str(self.folder) if self.folder is not None else "the package index"
        message = explain_absence(platform, wanted.name, str(wanted.specifier), names)
        versions = _VERSIONS.search(said)
        if versions and versions.group(1) != "none":
            message += f"; versions that fit are {', '.join(versions.group(1).split(', ')[-8:])}"
        return NoWheel(canonicalize_name(wanted.name), f"{where}: {message}", hint=_hint(platform, self.folder))

    def _list(self, requirement: str, platform: WheelPlatform) -> tuple[set[str], str]:
        """(the names of all wheels there are of a package, fitting or not, pip's own account of what it passed over)."""
        if self.folder is not None:
            return {p.name for p in self.folder.glob("*.whl")}, ""
        with tempfile.TemporaryDirectory(prefix="edgevit-wheels-") as place:
            _, said = self._run([requirement], platform, Path(place), None, "-vv")
        return set(_WHEEL.findall(said)), said


def _hint(platform: WheelPlatform, folder: Path | None) -> str:
    if folder is not None:
        return f"put the wheel into {folder}"
    if platform.machine in ("armv6l", "armv7l"):
        return (
            "PIP_EXTRA_INDEX_URL=https://www.piwheels.org/simple edgevit target provision … (wheels for 32-bit Raspberry Pi OS)"
        )
    return ""
