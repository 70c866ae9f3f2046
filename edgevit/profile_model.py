"""The shape of ``profiles/*.yaml``: pydantic models, apart from :mod:`edgevit.profile` so that a listing needs no pydantic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Status = Literal["measured", "documented", "unproven"]
RuntimeName = Literal["onnxruntime", "litert", "tflite-runtime"]
Scheme = Literal["fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed"]

T = TypeVar("T")

NAME = r"^[a-z0-9][a-z0-9-]*$"
PYTHON = r"^3\.\d{1,2}$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Sourced(_Model):
    source: str = Field(min_length=3, max_length=400, description="where the fact comes from")
    status: Status


class Fact(_Sourced, Generic[T]):
    """One value, where it comes from, and how sure it is."""

    value: T


class Isa(_Sourced):
    """CPU features by the names Linux gives them in ``/proc/cpuinfo``: there, and known not to be there."""

    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


class Gpu(_Sourced):
    """The GPU; ``usable`` says whether edgevit runs on it today, ``needs`` what it would take where not."""

    name: str
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    usable: bool
    needs: str = ""

    @model_validator(mode="after")
    def _check_needs(self) -> Gpu:
        if not self.usable and not self.needs:
            raise ValueError("a GPU that is not usable says in 'needs' what it would take")
        return self


class Ceiling(_Model):
    """The newest ONNX IR version and opset that the oldest onnxruntime of this board accepts."""

    ir_version: int = Field(ge=3, le=100)
    opset: int = Field(ge=7, le=100)


@dataclass(frozen=True)
class OnnxRuntimeCeiling:
    """The lowest ceiling over several profiles, and the onnxruntime version that sets it."""

    ir_version: int
    opset: int
    runtime_version: str


class Requirement(_Model):
    """What pip installs for these Python versions."""

    python: tuple[str, ...] = Field(min_length=1, description="minor versions, such as '3.11'")
    install: tuple[str, ...] = Field(min_length=1, description="pip requirements")

    @field_validator("python")
    @classmethod
    def _check_python(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if not re.fullmatch(PYTHON, one):
                raise ValueError(f"got {one!r}, expected a minor version such as '3.11'")
        return value


class RuntimeOption(_Sourced):
    """A runtime worth trying, with the execution providers worth trying in it, best first."""

    runtime: RuntimeName
    machines: tuple[str, ...] = Field(min_length=1, description="`uname -m` values it exists for")
    oldest: str = Field(pattern=r"^\d+\.\d+(\.\d+)?$", description="oldest version a board of this kind may have")
    ceiling: Ceiling | None = None
    providers: tuple[str, ...] = Field(min_length=1)
    pip: tuple[Requirement, ...] = ()
    system: str = Field(default="", description="where it comes from when not from pip")
    refuses: tuple[Scheme, ...] = Field(default=(), description="schemes this runtime is known to get wrong")

    @model_validator(mode="after")
    def _check_ceiling(self) -> RuntimeOption:
        if (self.runtime == "onnxruntime") != (self.ceiling is not None):
            raise ValueError("'ceiling' (ir_version, opset) goes with onnxruntime, and with it alone")
        if not self.pip and not self.system:
            raise ValueError("either 'pip' or 'system' says where the runtime comes from")
        return self

    def requirements(self, python: str) -> tuple[str, ...] | None:
        """pip requirements for a Python version such as ``3.11.2``; None where no wheel is known."""
        minor = ".".join(python.split(".")[:2])
        return next((r.install for r in self.pip if minor in r.python), None)


class RefusedProvider(_Sourced):
    """A provider edgevit does not run on this board, and what it would need."""

    runtime: RuntimeName
    provider: str
    needs: str = Field(min_length=10)


class PaysOff(_Sourced):
    """Precisions that are worth building for one runtime on this board, best first."""

    runtime: RuntimeName
    schemes: tuple[Scheme, ...] = Field(min_length=1)


class Sensor(_Sourced):
    """Something the board can be asked about itself."""

    name: str = Field(pattern=NAME)
    read: str = Field(min_length=1, description="file or command")
    unit: str


class DaemonNeeds(_Sourced):
    """What a daemon's user must reach to read this board's sensors."""

    groups: tuple[str, ...] = Field(default=(), description="groups of the daemon's user, where the board has them")
    devices: tuple[str, ...] = Field(default=(), description="device files, as shell patterns under /dev")

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if not one.startswith("/dev/") or ".." in one or any(c.isspace() for c in one):
                raise ValueError(f"got {one!r}, expected a file or pattern under /dev")
        return value


class Profile(_Model):
    """A kind of board. Lists are in order of preference."""

    name: str = Field(pattern=NAME, max_length=60)
    title: str = Field(min_length=3, max_length=80)
    machines: tuple[str, ...] = Field(min_length=1, description="`uname -m` values")
    board_model: Fact[str] | None = Field(default=None, description="regular expression for /proc/device-tree/model")
    cpu: Fact[str]
    cores: Fact[int] | None = None
    isa: Isa
    memory_mb: Fact[tuple[int, ...]] | None = None
    gpu: Gpu | None = None
    system_python: Fact[str] | None = None
    min_python: Fact[str]
    python_hint: str = ""
    threads: Fact[tuple[int, ...]] = Field(description="thread counts worth measuring; the first is the default")
    width_multiple: Fact[int] = Field(description="pruned and factorised widths are rounded to a multiple of this")
    runtimes: tuple[RuntimeOption, ...] = Field(min_length=1)
    refused: tuple[RefusedProvider, ...] = ()
    pays_off: tuple[PaysOff, ...] = ()
    sensors: tuple[Sensor, ...] = ()
    daemon: DaemonNeeds | None = None
    notes: tuple[Fact[str], ...] = ()

    @field_validator("board_model")
    @classmethod
    def _check_pattern(cls, value: Fact[str] | None) -> Fact[str] | None:
        if value is not None:
            try:
                re.compile(value.value)
            except re.error as e:
                raise ValueError(f"{value.value!r} is not a regular expression: {e}") from e
        return value

    @field_validator("threads")
    @classmethod
    def _check_threads(cls, value: Fact[tuple[int, ...]]) -> Fact[tuple[int, ...]]:
        if not value.value or min(value.value) < 1:
            raise ValueError(f"got {list(value.value)}, expected at least one count, each at least 1")
        return value

    @property
    def default_threads(self) -> int:
        return self.threads.value[0]

    @property
    def formats(self) -> tuple[str, ...]:
        """Model formats some runtime of this board reads, in order of preference."""
        of = {"onnxruntime": "onnx", "litert": "tflite", "tflite-runtime": "tflite"}
        return tuple(dict.fromkeys(of[o.runtime] for o in self.runtimes))

    def options(self, machine: str) -> tuple[RuntimeOption, ...]:
        """The runtimes that exist for ``machine`` (``uname -m``), best first."""
        return tuple(o for o in self.runtimes if machine in o.machines)

    def refusal(self, runtime: str, provider: str) -> str | None:
        """Why ``provider`` of ``runtime`` is refused on this board and what it would need; None where it is not."""
        return next((r.needs for r in self.refused if (r.runtime, r.provider) == (runtime, provider)), None)

    def schemes(self, runtime: str) -> tuple[str, ...]:
        """The precisions that pay off in ``runtime`` here, best first; empty where nothing is known."""
        return next((p.schemes for p in self.pays_off if p.runtime == runtime), ())

    def fact_lines(self) -> list[FactLine]:
        """Every fact as one line for people, in the order of the file."""
        lines = [_line("board model", self.board_model)] if self.board_model else []
        lines.append(_line("cpu", self.cpu))
        if self.cores:
            lines.append(_line("cores", self.cores))
        isa = ", ".join([*self.isa.has, *(f"no {f}" for f in self.isa.lacks)]) or "–"
        lines.append(FactLine("isa", isa, self.isa.status, self.isa.source))
        if self.memory_mb:
            sizes = " or ".join(f"{m:,}" for m in self.memory_mb.value)
            lines.append(FactLine("memory", f"{sizes} MB", self.memory_mb.status, self.memory_mb.source))
        if self.gpu:
            text = f"{self.gpu.name}, compute capability {self.gpu.compute_capability}"
            text += "" if self.gpu.usable else f"; not used, needs {self.gpu.needs}"
            lines.append(FactLine("gpu", text, self.gpu.status, self.gpu.source))
        if self.system_python:
            lines.append(_line("system Python", self.system_python))
        lines.append(_line("oldest Python", self.min_python))
        counts = ", ".join(str(t) for t in self.threads.value)
        lines.append(
            FactLine("threads", f"{counts} (default {self.default_threads})", self.threads.status, self.threads.source)
        )
        lines += [_runtime_line(i, o) for i, o in enumerate(self.runtimes, 1)]
        lines += [FactLine("refused", f"{r.provider}: needs {r.needs}", r.status, r.source) for r in self.refused]
        lines += [FactLine("pays off", f"{p.runtime}: {', '.join(p.schemes)}", p.status, p.source) for p in self.pays_off]
        lines += [FactLine("sensor", f"{s.name}: {s.read} ({s.unit})", s.status, s.source) for s in self.sensors]
        if self.daemon:
            needs = ", ".join([*(f"group {g}" for g in self.daemon.groups), *self.daemon.devices])
            lines.append(FactLine("daemon needs", needs, self.daemon.status, self.daemon.source))
        return lines + [_line("note", n) for n in self.notes]


@dataclass(frozen=True)
class FactLine:
    """A fact as ``profiles show`` prints it."""

    name: str
    value: str
    status: Status
    source: str


def _line(name: str, fact: Fact[T]) -> FactLine:
    return FactLine(name, str(fact.value), fact.status, fact.source)


def _runtime_line(position: int, option: RuntimeOption) -> FactLine:
    text = f"{option.runtime} ≥ {option.oldest} on {'/'.join(option.machines)}: {', '.join(option.providers)}"
    if option.ceiling:
        text += f"; IR ≤ {option.ceiling.ir_version}, opset ≤ {option.ceiling.opset}"
    if option.refuses:
        text += f"; refuses {', '.join(option.refuses)}"
    for one in option.pip:
        text += f"; Python {_span(one.python)}: {' '.join(one.install)}"
    if option.system:
        text += f"; {option.system}"
    return FactLine(f"runtime {position}", text, option.status, option.source)


def _span(versions: tuple[str, ...]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]}–{versions[-1]}"


def as_mapping(profile: Profile) -> Mapping[str, object]:
    """A profile as plain JSON values, for ``--json``."""
    return profile.model_dump(mode="json")
