"""One measurement of one run in figures: what :mod:`edgevit.results.stats` makes of raw samples, and tables and pages show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from device_agents.wire import Cooling, OperatorProfile, Verdict
from edgevit.results.sustained import Sustained


@dataclass(frozen=True)
class Summary:
    """One measurement of one run in figures.

    Times in milliseconds, memory and files in megabytes (10⁶ bytes); top-1, its standard error and agreement as shares of 1.
    ``energy_mj`` is net of the idle board, ``energy_gross_mj`` is not; both are an inference's, within ``energy_scope``.
    ``sampler_cpu`` is the share of one core that watching the board took while timed. What is None has its reason in the field
    of the same name ending in ``_absent``. ``interval_of`` says what the intervals repeat: ``processes``, or ``samples`` where
    there are too few of those: what differs from process to process is then not in them. ``mismatch``: how the outputs differ
    from those recorded at build time, or empty. ``boot_id``: the kernel's name for the board's time since it started.
    """

    run_id: str
    batch_id: str
    target: str
    board: str
    model: str
    recipe: str
    bundle: str
    bundle_name: str
    artifact: str
    artifact_sha256: str
    format: str
    scheme: str
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    batch: int
    plan: str
    started_at: str
    processes: int
    n: int
    p50_ms: float | None
    p50_absent: str
    p90_ms: float | None
    p90_absent: str
    p99_ms: float | None
    p99_absent: str
    p90_early_stopping_ms: float | None
    mean_ms: float | None
    std_ms: float | None
    min_ms: float | None
    max_ms: float | None
    process_p50_ms: tuple[float, ...]
    first_inference_ms: float | None
    init_ms: float | None
    init_cold_ms: float | None
    peak_mb: float | None
    peak_absent: str
    memory_delta_mb: float | None
    file_mb: float | None
    top1: float | None
    top1_error: float | None
    top1_absent: str
    images: int
    correct: int
    evaluation: str
    failure: str
    verdict: Verdict
    temperature_c: tuple[float, float] | None = None
    frequency_mhz: tuple[float, float] | None = None
    throttle: tuple[str, ...] = ()
    governor: str = ""
    boot_id: str | None = None
    gpu_load: tuple[float, float] | None = None
    gpu_frequency_mhz: tuple[float, float] | None = None
    energy_mj: float | None = None
    energy_absent: str = "nothing was timed"
    energy_gross_mj: float | None = None
    energy_gross_absent: str = "nothing was timed"
    energy_scope: str = ""
    energy_covers: str = ""
    power_mw: float | None = None
    idle_power_mw: float | None = None
    sampler_cpu: float | None = None
    speedup: float | None = None
    speedup_absent: str = "no fp32 was measured beside it"
    reference: str = ""
    agreement: float | None = None
    agreement_absent: str = "no fp32 was scored beside it"
    p50_interval_ms: tuple[float, float] | None = None
    p90_interval_ms: tuple[float, float] | None = None
    p99_interval_ms: tuple[float, float] | None = None
    interval_of: str = ""
    mismatch: str = ""
    p99_early_stopping_ms: float | None = None
    images_per_s: float | None = None
    image_p50_ms: float | None = None
    foreign_cpu: float | None = None
    waiting: float | None = None
    affinity: tuple[int, ...] = ()
    stride: int = 1
    cooling: tuple[Cooling, ...] = ()
    governor_before: str = ""
    sustained: Sustained | None = None
    profile: OperatorProfile | None = field(default=None, repr=False)
    profile_absent: str = ""
    predictions: tuple[int, ...] | None = field(default=None, repr=False)
    labels: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The artifact's name, with the recipe's where the name does not hold it already."""
        return self.artifact if self.recipe in self.artifact or not self.recipe else f"{self.recipe}/{self.artifact}"

    @property
    def rankable(self) -> bool:
        """Whether the figure may enter a ranking: measured, and VALID."""
        return self.p50_ms is not None and not self.failure and self.verdict.valid


def with_values(s: Summary | None, values: Mapping[str, object]) -> Summary:
    """``s`` with other values, or a summary of ``values`` alone where they are all there: what ``dataclasses.replace`` and the
    constructor do, in a tenth of the time for so many fields."""
    made = object.__new__(Summary)
    made.__dict__.update({} if s is None else s.__dict__)
    made.__dict__.update(values)
    return made
