"""Wheels and package indexes made on the spot: small invented ones, and real ones from the packages installed here."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from edgevit.fleet.wheel_index import FoundWheel, read_wheel
from edgevit.fleet.wheel_platform import WheelPlatform
from tests.support.agent_bundle import AgentProcess, result_of

ONNXRUNTIME = ("onnxruntime", "numpy", "flatbuffers", "packaging", "protobuf")
"""What ``onnxruntime`` and its requirements are made of."""

LEFT_OUT = ("/INSTALLER", "/REQUESTED", "/RECORD")


def platform(python: str = "3.11.2", machine: str = "aarch64", glibc: int = 36, kernel_machine: str = "") -> WheelPlatform:
    major, minor = python.split(".")[:2]
    return WheelPlatform(python, f"cp{major}{minor}", machine, kernel_machine or machine, "6.6.31", "glibc", (2, glibc))


def wheel_bytes(filename: str, requires: Sequence[str] = (), files: Mapping[str, str] | None = None, python: str = "") -> bytes:
    """A wheel of this name that pip installs: its metadata, and ``files``."""
    name, version = filename.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    metadata += [f"Requires-Python: {python}\n"] if python else []
    metadata += [f"Requires-Dist: {line}\n" for line in requires]
    tags = "".join(
        f"Tag: {i}-{a}-{p}\n"
        for i in filename[:-4].split("-")[-3].split(".")
        for a in filename[:-4].split("-")[-2].split(".")
        for p in filename[:-4].split("-")[-1].split(".")
    )
    members = {
        **(files or {}),
        f"{info}/METADATA": "".join(metadata),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n{tags}",
    }
    members[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*members, f"{info}/RECORD"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in members.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return buffer.getvalue()


def make_wheel(folder: Path, filename: str, requires: Sequence[str] = (), files: Mapping[str, str] | None = None) -> FoundWheel:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / filename
    path.write_bytes(wheel_bytes(filename, requires, files))
    return found(path)


def repack(package: str, folder: Path, site: Path | None = None) -> FoundWheel:
    """The wheel that a package installed here, or in ``site``, came from, near enough: its files and tags, uncompressed."""
    dist = importlib.metadata.distribution(package)
    if site is not None:
        dist = next(iter(importlib.metadata.distributions(name=package, path=[str(site)])))
    tags = [
        line.partition(": ")[2].split("-") for line in (dist.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")
    ]
    joined = "-".join(".".join(dict.fromkeys(t[i] for t in tags)) for i in range(3))
    path = folder / f"{dist.metadata['Name'].replace('-', '_').replace('.', '_')}-{dist.version}-{joined}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in dist.files or ():
            name = file.as_posix()
            if name.startswith("../") or "__pycache__" in name or "/tests/" in name or name.endswith(LEFT_OUT):
                continue
            archive.write(str(file.locate()), name)
        info = next(
            f.parent.as_posix() for f in dist.files or () if f.name == "METADATA" and f.parent.name.endswith(".dist-info")
        )
        record = "".join(f"{name},,\n" for name in [*archive.namelist(), f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return found(path)


def found(path: Path) -> FoundWheel:
    return read_wheel(path.name, path, hashlib.sha256(path.read_bytes()).hexdigest())


def as_sent(wheels: Sequence[FoundWheel]) -> tuple[wire.Wheel, ...]:
    return tuple(wire.Wheel(w.filename, w.sha256, w.size) for w in wheels)


def make_index(folder: Path, wheels: Sequence[tuple[Path, str]]) -> str:
    """A package index of (wheel, ``Requires-Python``) as its address, in the form of PEP 503."""
    by_name: dict[str, list[str]] = {}
    for path, python in wheels:
        name = path.name.split("-")[0].replace("_", "-").replace(".", "-").lower()
        attribute = f' data-requires-python="{html.escape(python)}"' if python else ""
        by_name.setdefault(name, []).append(f'<a href="{path.as_uri()}"{attribute}>{path.name}</a>')
    for name, links in by_name.items():
        page = folder / "simple" / name / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("<!DOCTYPE html><html><body>" + "".join(links) + "</body></html>")
    return (folder / "simple").as_uri()


def use_index(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let pip ask this index alone, whatever the person who runs the tests has configured."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", address)


def provision(
    agent: AgentProcess,
    wheels: Sequence[FoundWheel] = (),
    *,
    stop_after: int | None = None,
    timeout: float = 120.0,
    **settings: Any,
) -> tuple[Any, list[dict[str, Any]]]:
    """The host's side of ``provision``, as plain as it can be: (its result, every line). Raises AgentRefused.

    ``stop_after``: so many bytes are sent, and then the agent is killed; the result is None then.
    """
    request = wire.EnvironmentRequest(
        **{"requirements": (), "system_site": False, "wheels": as_sent(wheels), "unpacked_bytes": 0, **settings}
    )
    process = agent.start("provision")
    assert process.stdin and process.stdout
    try:
        process.stdin.write(wire.dumps(request))
        process.stdin.flush()
        lines: list[dict[str, Any]] = []
        for raw in process.stdout:
            lines.append(json.loads(raw))
            if lines[-1]["type"] == "need":
                data = b"".join(_needed(lines[-1], wheels))
                process.stdin.write(data[:stop_after])
                process.stdin.close()
                if stop_after is not None:
                    time.sleep(0.3)
                    process.kill()
                    return None, lines
        process.wait(timeout)
        return result_of(lines), lines
    finally:
        process.kill()
        process.wait()


def _needed(message: Mapping[str, Any], wheels: Sequence[FoundWheel]) -> list[bytes]:
    by_digest = {w.sha256: w.path for w in wheels}
    return [by_digest[n["sha256"]].read_bytes()[n["offset"] :] for n in message["blobs"]]
