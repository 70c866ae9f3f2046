"""Everything that crosses the wire, declared once as frozen records.

Host and device exchange only the types of this file; :mod:`device_agents.codec` holds what they declare.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from device_agents.chunks import MAX_CHUNK_BYTES as MAX_CHUNK_BYTES
from device_agents.chunks import MAX_INDEX_BYTES as MAX_INDEX_BYTES
from device_agents.chunks import check_index as check_index
from device_agents.chunks import digest_chunk as digest_chunk
from device_agents.chunks import pack_chunk_index as pack_chunk_index
from device_agents.codec import MAX_DEPTH as MAX_DEPTH
from device_agents.codec import T as T
from device_agents.codec import WireError as WireError
from device_agents.codec import decode as decode
from device_agents.codec import dumps as dumps
from device_agents.codec import encode as encode
from device_agents.codec import items, name_field, number, record, sha256_field, text
from device_agents.codec import loads as loads
from device_agents.codec import parse_json as parse_json
from device_agents.limits import MAX_JOB_BYTES as MAX_JOB_BYTES
from device_agents.limits import NAME_PATTERN as NAME_PATTERN
from device_agents.limits import SHA256_PATTERN as SHA256_PATTERN

AGENT_VERSION = 1
"""Raised whenever an older agent could misread what this one accepts; a manifest names the lowest it needs."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_SIGNATURE_BYTES = 64 * 1024
MAX_RUN_BYTES = 64 * 1024 * 1024
MAX_BLOB_BYTES = 4 * 1024 * 1024 * 1024

BUNDLE_SCHEMA = "edgevit.bundle/1"
FACTS_SCHEMA = "edgevit.facts/1"
DAEMON_SCHEMA = "edgevit.daemon/1"
JOB_SCHEMA = "edgevit.job/1"
RUN_SCHEMA = "edgevit.run/1"
SIGNATURE_NAMESPACE = "edgevit-bundle"

FORMATS = ("onnx", "tflite", "ort")
SCHEMES = ("fp32", "fp16", "int8-dynamic", "int8-static", "int8-weights", "int4-weights", "mixed")
RUNTIMES = ("onnxruntime", "litert", "tflite-runtime")
RUNTIMES_OF_FORMAT = {"onnx": ("onnxruntime",), "tflite": ("litert", "tflite-runtime"), "ort": ("onnxruntime",)}

# --------------------------------------------------------------------------------------------------------------------
# Messages: an agent command prints one JSON object a line; the last is "result" or "refusal"
# --------------------------------------------------------------------------------------------------------------------


@record
class Refusal:
    """Why the agent did not do what was asked. ``code`` is stable; the host maps it to its own error and hint."""

    code: str = name_field(60)
    message: str = text(max_len=20_000)
    hint: str = text(max_len=4_000, default="")


# --------------------------------------------------------------------------------------------------------------------
# The bundle's manifest
# --------------------------------------------------------------------------------------------------------------------


@record
class Blob:
    """Bytes in the bundle, known by their SHA-256 alone: no names, so no paths to escape through."""

    sha256: str = sha256_field()
    size: int = number(1, MAX_BLOB_BYTES)


@record
class TensorSpec:
    """One input or output. ``layout`` says how an image is laid out; empty for outputs."""

    name: str = text(max_len=400)
    dtype: str = text(choices=("float32", "float16", "uint8", "int8"))
    shape: Tuple[int, ...] = items(8, 1)
    layout: str = text(choices=("NCHW", "NHWC", ""), default="")


@record
class Preprocessing:
    """From a decoded image to the model's input, in the order applied: resize, crop, scale to [0, 1], normalise.

    ``height`` and ``width`` in pixels; ``resize_short`` is the short side in pixels before the centre crop (both sides are
    resized to (height, width) when ``crop_mode`` is ``squash``); ``mean`` and ``std`` are per RGB channel on the [0, 1] scale.
    """

    height: int = number(1, 4096)
    width: int = number(1, 4096)
    resize_short: int = number(1, 8192)
    interpolation: str = text(choices=("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"))
    crop_mode: str = text(choices=("center", "squash", "border"))
    mean: Tuple[float, ...] = items(3, 3)
    std: Tuple[float, ...] = items(3, 3)

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise WireError("std", "got {}, expected three numbers above zero".format(list(self.std)))


@record
class Tolerance:
    """How far an artifact's outputs on the device may lie from those recorded at build time.

    ``max_relative``: largest absolute difference ÷ largest absolute recorded output, over all golden images; None where the
    scheme makes it meaningless. ``min_cosine``: smallest cosine over images. ``top1_margin``: top-1 must agree on every image
    whose recorded best and second-best outputs lie further apart than this (in output units).
    """

    max_relative: Optional[float] = number(0.0, 1.0)
    min_cosine: float = number(-1.0, 1.0)
    top1_margin: float = number(0.0, 1e9)


@record
class GoldenInputs:
    """Images that every artifact is checked with, uint8 NHWC in a ``.npy`` blob; ``source`` tells real from synthetic."""

    blob: Blob
    count: int = number(1, 4096)
    source: str = text(choices=("images", "synthetic"))


@record
class GoldenOutputs:
    """The artifact's own outputs at build time, float32 (count, classes) in a ``.npy`` blob, and the runtime that made them."""

    blob: Blob
    runtime: str = text(choices=RUNTIMES)
    runtime_version: str = text(max_len=60)
    tolerance: Tolerance


@record
class EvaluationSet:
    """Labelled images made by the model's own transform: uint8 NHWC and int64 (count,) in two ``.npy`` blobs."""

    images: Blob
    labels: Blob
    count: int = number(1, 10_000_000)
    name: str = text(max_len=200)


@record
class Parity:
    """The artifact against the torch module that was exported, on ``images`` calibration or synthetic images."""

    images: int = number(1, 10_000_000)
    max_abs_error: float = number(0.0, 1e30)
    max_relative_error: float = number(0.0, 1e30)
    min_cosine: float = number(-1.0, 1.0)
    top1_agreement: float = number(0.0, 1.0)


@record
class CheckedRuntime:
    """A runtime in which the artifact really ran at build time, and how far its outputs lay from the recorded ones."""

    runtime: str = text(choices=RUNTIMES)
    version: str = text(max_len=60)
    python: str = text(max_len=60)
    max_abs_error: float = number(0.0, 1e30)
    min_cosine: float = number(-1.0, 1.0)


@record
class Placement:
    """What of an artifact runs where, as the runtime of the machine it was built on partitioned it for its CPU.

    ``macs`` are the multiply-adds of one inference in matrix products and convolutions; ``int8_share`` and ``int4_share`` those
    that multiply integers of 8 and 4 bits; ``float_operators`` counts operators that multiply floats, by kind. ``nodes`` counts
    nodes by execution provider or delegate; ``outside`` those the delegate did not take, by kind, and ``partitions`` the pieces
    it took. ``leftover_pairs`` are Q→DQ pairs left in the optimised ONNX graph, None for TFLite. ``activation_bytes`` estimates
    the most bytes of activations alive at once, weights and scratch aside.
    """

    runtime: str = text(choices=RUNTIMES)
    runtime_version: str = text(max_len=60)
    macs: int = number(0, 10**16)
    int8_share: float = number(0.0, 1.0)
    int4_share: float = number(0.0, 1.0)
    float_operators: Dict[str, int] = items(200)
    nodes: Dict[str, int] = items(20)
    outside: Dict[str, int] = items(200)
    partitions: int = number(0, 1_000_000)
    leftover_pairs: Optional[int] = number(0, 1_000_000)
    activation_bytes: int = number(0, 2**62)


@record
class Artifact:
    """One model file in one format. ``opset`` and ``ir_version`` are None for TFLite, as read back from the file itself."""

    name: str = name_field()
    format: str = text(choices=FORMATS)
    scheme: str = text(choices=SCHEMES)
    blob: Blob
    input: TensorSpec
    output: TensorSpec
    batch: int = number(1, 4096)
    opset: Optional[int] = number(1, 1000)
    ir_version: Optional[int] = number(1, 1000)
    operators: Dict[str, int] = items(1000)
    fits: Tuple[str, ...] = items(100, 1, NAME_PATTERN, 120)
    golden: GoldenOutputs
    parity: Parity
    checked: Tuple[CheckedRuntime, ...] = items(20)
    notes: Tuple[str, ...] = items(100, max_len=1000, default=())
    placement: Optional[Placement] = None


@record
class ModelInfo:
    """Where the model came from. ``digest`` covers its weights and structure; ``overrides`` what a person set by hand."""

    name: str = text(max_len=200)
    digest: str = sha256_field()
    weights: str = text(max_len=400)
    classes: int = number(1, 10_000_000)
    parameters: int = number(0, 10**13)
    macs: Optional[int] = number(0, 10**16)
    overrides: Dict[str, str] = items(100)


@record
class RecipeInfo:
    name: str = name_field()
    digest: str = sha256_field()


@record
class BeforeAfter:
    """A count before a step and after it."""

    before: int = number(0, 2**62)
    after: int = number(0, 2**62)


@record
class Damage:
    """A module's outputs after a step against the original model's, on ``images`` calibration images: mean cosine of the logits
    and share of equal top-1."""

    images: int = number(1, 10**9)
    cosine: float = number(-1.0, 1.0)
    agreement: float = number(0.0, 1.0)


@record
class StepReport:
    """What one step did: the layers it touched, as text for people by layer, and what it cost. A step that leaves the module as
    it was has no sizes and no damage of its own. ``artifacts`` names those it was done for; empty: all of the bundle."""

    step: str = name_field()
    layers: int = number(0, 10_000_000)
    summary: str = text(max_len=4000)
    details: Dict[str, str] = items(2000)
    parameters: Optional[BeforeAfter] = None
    macs: Optional[BeforeAfter] = None
    damage: Optional[Damage] = None
    seconds: Optional[float] = number(0.0, 1e9, default=None)
    artifacts: Tuple[str, ...] = items(100, pattern=NAME_PATTERN, max_len=120, default=())


@record
class NotMade:
    """An artifact that was asked for and is not in the bundle, and why."""

    artifact: str = name_field()
    reason: str = text(max_len=2000)


@record
class Manifest:
    """Everything a device needs to verify, run and check a model. Signed as the exact bytes it is stored in.

    ``chunks`` is the index of how the other blobs are cut (:mod:`device_agents.chunks`); None in older bundles.
    """

    schema: str = text(choices=(BUNDLE_SCHEMA,))
    name: str = name_field(200)
    version: int = number(1, 2**62)
    minimum_agent: int = number(1, 10**6)
    made_by: str = text(max_len=200)
    model: ModelInfo
    recipe: RecipeInfo
    steps: Tuple[StepReport, ...] = items(100)
    preprocessing: Preprocessing
    labels: Optional[Blob]
    golden: GoldenInputs
    evaluation: Optional[EvaluationSet]
    evaluation_absent: str = text(max_len=400)
    artifacts: Tuple[Artifact, ...] = items(100, 1)
    tools: Dict[str, str] = items(100)
    not_made: Tuple[NotMade, ...] = items(100, default=())
    chunks: Optional[Blob] = None

    def blobs(self) -> Tuple[Blob, ...]:
        """Every blob once, in a fixed order, the chunk index first."""
        return tuple(dict.fromkeys(self._named_blobs()))

    def _named_blobs(self) -> List[Blob]:
        """As the fields name them; several may name the same."""
        named = [self.chunks, self.golden.blob, self.labels]
        for artifact in self.artifacts:
            named += [artifact.blob, artifact.golden.blob]
        if self.evaluation:
            named += [self.evaluation.images, self.evaluation.labels]
        return [blob for blob in named if blob is not None]

    def artifact(self, name: str) -> Optional[Artifact]:
        return next((a for a in self.artifacts if a.name == name), None)

    def __post_init__(self) -> None:
        names = [a.name for a in self.artifacts]
        if len(set(names)) != len(names):
            raise WireError("artifacts", "two artifacts share a name: {}".format(", ".join(sorted(names))))
        sizes: Dict[str, int] = {}
        for blob in self._named_blobs():
            if sizes.setdefault(blob.sha256, blob.size) != blob.size:
                raise WireError("blobs", "{} is given two sizes".format(blob.sha256[:12]))


# --------------------------------------------------------------------------------------------------------------------
# What a device is, and what is on it
# --------------------------------------------------------------------------------------------------------------------


@record
class ProviderFact:
    """One execution provider of one runtime; ``proven`` only after a real inference through it."""

    name: str = text(max_len=120)
    proven: bool
    detail: str = text(max_len=4000, default="")


@record
class RuntimeFact:
    runtime: str = text(choices=RUNTIMES)
    version: str = text(max_len=60)
    providers: Tuple[ProviderFact, ...] = items(50)


@record
class Variant:
    """What is measured and what is activated: artifact × runtime × provider × threads, of one installed bundle."""

    bundle: str = sha256_field()
    artifact: str = name_field()
    runtime: str = text(choices=RUNTIMES)
    provider: str = text(max_len=120)
    threads: int = number(1, 1024)


@record
class Active:
    """What an application on the device loads. ``policy`` says how the variant was chosen."""

    variant: Variant
    bundle_name: str = name_field(200)
    bundle_version: int = number(1, 2**62)
    policy: str = text(max_len=400)
    activated_at: str = text(max_len=40)


@record
class InstalledBundle:
    bundle: str = sha256_field()
    name: str = name_field(200)
    version: int = number(1, 2**62)


WHEEL_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.]*-[A-Za-z0-9_.!+]+(-[0-9][A-Za-z0-9_.]*)?(-[A-Za-z0-9_.]+){3}\.whl"
"""A wheel's file name (PEP 427). No separator of paths can stand in it, and pip trusts what it says."""


@record
class Wheel:
    """One wheel: its true file name, which pip needs, and its bytes."""

    name: str = text(WHEEL_PATTERN, 255)
    sha256: str = sha256_field()
    size: int = number(1, MAX_BLOB_BYTES)

    @property
    def is_pip(self) -> bool:
        return self.name.partition("-")[0].lower() == "pip"


@record
class Environment:
    """The Python environment that provisioning made: the requirements it was resolved for, and what was installed into it.

    ``system_site``: it sees the system's packages. ``python``: the version of the interpreter that made it."""

    requirements: Tuple[str, ...] = items(100, max_len=400)
    system_site: bool
    python: str = text(max_len=60)
    wheels: Tuple[Wheel, ...] = items(500)


@record
class EnvironmentRequest:
    """What ``provision`` shall make of wheels that the host resolved for this device; one of them is pip's own.

    ``unpacked_bytes``: what those to install take then. ``keep``: ``runtime/provider`` pairs that the system has and that must
    pass an inference in the new environment too. ``fresh``: make it anew though it is there."""

    requirements: Tuple[str, ...] = items(100, max_len=400)
    system_site: bool
    wheels: Tuple[Wheel, ...] = items(500)
    unpacked_bytes: int = number(0, 10**12)
    keep: Tuple[str, ...] = items(20, pattern=r"[a-z-]{1,40}/[A-Za-z0-9_]{1,80}", max_len=130, default=())
    fresh: bool = False

    def grows(self, there: Optional[Environment]) -> bool:
        """Whether ``there`` becomes this by additions alone: then only those are sent and installed, into a copy of it."""
        if self.fresh or there is None or there.system_site != self.system_site:
            return False
        wanted = set(self.wheels)
        return all(w in wanted for w in there.wheels if not w.is_pip)

    def beyond(self, there: Optional[Environment]) -> Tuple[Wheel, ...]:
        """The wheels to send to a device whose environment is ``there``; pip's own only together with others."""
        if not self.grows(there) or there is None:
            return self.wheels
        known = set(there.wheels)
        added = tuple(w for w in self.wheels if w not in known and not w.is_pip)
        return added + tuple(w for w in self.wheels if w.is_pip) if added else ()


@record
class Facts:
    """What one box has today. Whatever could not be read is None and ``absent`` holds the reason under its name.

    ``soabi`` names what extension modules its Python loads (``cpython-311-arm-linux-gnueabihf``): a 64-bit kernel may well run
    a 32-bit Python, and ``machine`` is the kernel's. ``active_refused``: why what is active would not be taken today (its
    signer was revoked, say); empty where it would, or where nothing is active."""

    schema: str = text(choices=(FACTS_SCHEMA,))
    agent_version: int = number(1, 10**6)
    agent_sha256: str = text(max_len=64)
    hostname: str = text(max_len=255)
    board_model: Optional[str] = text(max_len=400)
    os_name: Optional[str] = text(max_len=400)
    kernel: str = text(max_len=400)
    machine: str = text(max_len=60)
    cpu_model: Optional[str] = text(max_len=400)
    cpu_count: int = number(1, 100_000)
    cpu_features: Tuple[str, ...] = items(1000, max_len=60)
    python: str = text(max_len=60)
    runtime_python: Optional[str] = text(max_len=60)
    libc: Optional[str] = text(max_len=60)
    jetpack: Optional[str] = text(max_len=120)
    memory_mb: Optional[int] = number(0, 10**9)
    disk_free_mb: int = number(0, 10**12)
    clock_utc: str = text(max_len=40)
    boot_id: Optional[str] = text(max_len=60)
    numpy: Optional[str] = text(max_len=60)
    runtimes: Tuple[RuntimeFact, ...] = items(20)
    sensors: Tuple[str, ...] = items(200, max_len=200)
    ssh_keygen: Optional[str] = text(max_len=400)
    signers: int = number(0, 100_000)
    bundles: Tuple[InstalledBundle, ...] = items(10_000)
    active: Optional[Active]
    waiting_runs: Tuple[str, ...] = items(100_000, pattern=NAME_PATTERN, max_len=120)
    absent: Dict[str, str] = items(200)
    soabi: Optional[str] = text(max_len=120, default=None)
    environment: Optional[Environment] = None
    previous: Optional[Active] = None
    active_refused: str = text(max_len=400, default="")


TOKEN_PATTERN = r"[A-Za-z0-9.-]{8,160}"


@record
class OperatorLock:
    """Which operator alone may change what is installed and active on a device. ``since`` and ``until`` are times of day on the
    device's own clock, for people; ``left_s`` of its time is left, in seconds."""

    owner: str = text(max_len=200)
    what: str = text(max_len=400)
    token: str = text(TOKEN_PATTERN, 160)
    since: str = text(max_len=40)
    until: str = text(max_len=40)
    left_s: int = number(0, 10**6)

    def text(self) -> str:
        """Who, what, since when, until when."""
        times = (self.owner, self.what, self.since[:19] + "Z", self.until[:19] + "Z")
        left = "{} s are left".format(self.left_s) if self.left_s else "its command is still at work there"
        return "{} is at it ({}) since {}, until {} by the device's clock; {}".format(*times, left)


@record
class DaemonState:
    """What a daemon says of itself when it starts. ``protections`` are those that hold, as seen from inside, by name: ``yes``,
    ``no``, or what was found. ``quota_mb``: what its root may take on the disk, in MB; None: no limit."""

    schema: str = text(choices=(DAEMON_SCHEMA,))
    agent_sha256: str = text(max_len=64)
    pid: int = number(1, 2**31)
    user: str = text(max_len=100)
    unit: str = text(max_len=200)
    started_at: str = text(max_len=40)
    boot_id: Optional[str] = text(max_len=60)
    quota_mb: Optional[int] = number(1, 10**9)
    protections: Dict[str, str] = items(100)


@record
class DaemonStatus:
    """A root's daemon now. ``at_work``: it holds its lock; ``state`` is then of this daemon, else of the last one.

    ``unit`` is the systemd unit of this root, ``unit_state`` what systemd says of it ("absent" where there is none);
    ``resident_mb`` and ``cpu_seconds`` are the daemon's own, its jobs aside.
    """

    at_work: bool
    state: Optional[DaemonState]
    unit: str = text(max_len=200)
    kind: str = text(choices=("system", "user", ""))
    unit_state: str = text(max_len=200)
    resident_mb: Optional[float] = number(0.0, 1e9)
    cpu_seconds: Optional[float] = number(0.0, 1e12)
    queued: Tuple[str, ...] = items(100_000, pattern=NAME_PATTERN, max_len=120)
    spooled: Tuple[str, ...] = items(100_000, pattern=NAME_PATTERN, max_len=120)
    used_mb: int = number(0, 10**12)


# --------------------------------------------------------------------------------------------------------------------
# Jobs and what they measured
# --------------------------------------------------------------------------------------------------------------------


ORDERS = ("rounds", "mirrored")


@record
class RunPlan:
    """How a variant is measured. A *series* is one fresh worker process; its timed part ends once ``min_samples`` *and*
    ``min_seconds`` are reached, and in any case after ``max_seconds``. Warm-up ends likewise at both its lower bounds.

    ``order``: A B C A B C …, or ``mirrored``, A B C C B A …, where of the job's variants each two neighbours are a pair to
    compare and every two rounds a block (ABBA). ``sustained``: what heat does is the finding; each second is summed up and at
    most ``max_raw_samples`` are kept. Before each series the board may cool to ``cool_to_c`` (°C), or to ``cool_within_c`` over
    what it had when the job began, for at most ``cool_seconds``. ``affinity``: the CPUs the worker may use, all if empty.
    ``tune_system``: the ``performance`` governor while the job runs. Limits of the verdict: ``max_foreign_cpu`` (cores of
    others beyond those to spare), ``max_waiting`` (share of the time a timed thread waits for a CPU), ``max_frequency_drift``
    (share). ``profile_ops``: the runtime's own times of each operator, in a worker of their own.
    """

    name: str = name_field(60)
    processes: int = number(1, 100)
    warmup_iterations: int = number(0, 100_000)
    warmup_seconds: float = number(0.0, 3600.0)
    min_samples: int = number(1, 10_000_000)
    min_seconds: float = number(0.0, 86_400.0)
    max_seconds: float = number(0.001, 86_400.0)
    accuracy: bool
    order: str = text(choices=ORDERS, default="rounds")
    sustained: bool = False
    max_raw_samples: int = number(2, 10_000_000, default=1_000_000)
    cool_to_c: Optional[float] = number(-40.0, 150.0, default=None)
    cool_within_c: Optional[float] = number(0.0, 100.0, default=None)
    cool_seconds: float = number(0.0, 7200.0, default=300.0)
    affinity: Tuple[int, ...] = items(1024, default=())
    tune_system: bool = False
    max_foreign_cpu: float = number(0.0, 1e6, default=0.25)
    max_waiting: float = number(0.0, 1.0, default=0.10)
    max_frequency_drift: float = number(0.0, 1.0, default=0.10)
    profile_ops: bool = False

    def __post_init__(self) -> None:
        if any(cpu < 0 or cpu > 100_000 for cpu in self.affinity) or len(set(self.affinity)) != len(self.affinity):
            raise WireError("affinity", "got {}, expected distinct CPU numbers from 0 on".format(list(self.affinity)))
        if self.cool_to_c is not None and self.cool_within_c is not None:
            raise WireError("cool_within_c", "got a value beside cool_to_c, expected one of them")


@record
class Job:
    """One file in a device's queue: the variants are measured interleaved, one series each round, in the plan's order. A worker
    that holds more than ``memory_limit_mb`` (10⁶ bytes resident) is ended; None: no limit."""

    schema: str = text(choices=(JOB_SCHEMA,))
    run_id: str = name_field(60)
    batch_id: str = name_field(60)
    target: str = text(max_len=200)
    submitted_at: str = text(max_len=40)
    submitted_by: str = text(max_len=200)
    plan: RunPlan
    variants: Tuple[Variant, ...] = items(500, 1)
    timeout_seconds: float = number(1.0, 7 * 86_400.0)
    memory_limit_mb: Optional[float] = number(1.0, 1e9, default=None)


@record
class GoldenResult:
    """The worst case over the golden images, beside the tolerance it was held against."""

    passed: bool
    images: int = number(0, 4096)
    max_relative: float = number(0.0, 1e30)
    min_cosine: float = number(-1.0, 1.0)
    top1_disagreements: int = number(0, 4096)
    reason: str = text(max_len=2000)


@record
class Window:
    """About a second of a sustained series: ``count`` inferences that began within ``duration_ms`` from ``at_ms`` of the timed
    part on, their median and their slowest in ns."""

    at_ms: int = number(0, 2**62)
    duration_ms: int = number(0, 2**62)
    count: int = number(1, 2**62)
    p50_ns: int = number(0, 2**62)
    max_ns: int = number(0, 2**62)


COOLED = ("reached", "limit", "no-sensor")


@record
class Cooling:
    """A wait for a temperature before a series: the board was at ``from_c`` °C, ``to_c`` were wanted, and after ``seconds`` it
    was at ``at_c``."""

    outcome: str = text(choices=COOLED)
    from_c: Optional[float] = number(-300.0, 1000.0)
    to_c: Optional[float] = number(-300.0, 1000.0)
    at_c: Optional[float] = number(-300.0, 1000.0)
    seconds: float = number(0.0, 1e6)


@record
class Series:
    """One worker process's raw numbers, in nanoseconds of ``time.perf_counter_ns`` and megabytes (10⁶ bytes).

    ``first_inference_ns`` is the very first call after loading (the first golden image); ``samples_ns`` the timed part, never
    clipped. ``own_cpu`` is the worker's CPU time ÷ wall time of the timed part; ``foreign_cpu`` the busy cores of everything
    else on the CPUs the worker may use in that time (None where /proc/stat is not readable); ``waiting`` the time its threads
    stood ready and had no CPU ÷ wall time, summed over threads (None where /proc/…/schedstat is not readable). ``affinity`` are
    the CPUs it may use. Where more inferences were timed than the plan keeps, ``samples_ns`` holds every ``stride``-th of them;
    ``windows`` holds all, second by second, of a sustained series. ``engine_cache`` says for a provider that compiles what it
    loads whether it did (``cold``) or had kept it (``warm``).
    """

    process: int = number(0, 100_000)
    started_at: str = text(max_len=40)
    init_time_ns: int = number(0, 2**62)
    first_inference_ns: int = number(0, 2**62)
    warmup_ns: Tuple[int, ...] = items(10_000_000)
    samples_ns: Tuple[int, ...] = items(10_000_000)
    provider: str = text(max_len=120)
    runtime_version: str = text(max_len=60)
    golden: GoldenResult
    memory_before_mb: Optional[float] = number(0.0, 1e9)
    memory_init_delta_mb: Optional[float] = number(-1e9, 1e9)
    memory_delta_mb: Optional[float] = number(-1e9, 1e9)
    peak_memory_mb: Optional[float] = number(0.0, 1e9)
    own_cpu: Optional[float] = number(0.0, 1e6)
    foreign_cpu: Optional[float] = number(0.0, 1e6)
    swapped_pages: Optional[int] = number(0, 2**62)
    clock_step_ms: float = number(-1e15, 1e15)
    readings: Tuple["Reading", ...] = items(1_000_000)
    sampling: Optional["Sampling"] = None
    power: Optional["Power"] = None
    power_absent: str = text(max_len=400, default="")
    waiting: Optional[float] = number(0.0, 1e6, default=None)
    affinity: Tuple[int, ...] = items(1024, default=())
    stride: int = number(1, 2**31, default=1)
    engine_cache: str = text(choices=("", "cold", "warm"), default="")
    windows: Tuple[Window, ...] = items(100_000, default=())
    cooling: Optional[Cooling] = None


@record
class ClusterClock:
    """The clock of the CPUs that share one, named after them: ``cpu0-3``."""

    name: str = text(max_len=60)
    mhz: float = number(0.0, 1e6)


@record
class RailPower:
    """What one supply rail gave, by the board's own name for it. Rails may lie behind one another: they do not add up."""

    name: str = text(max_len=60)
    mw: float = number(-1e9, 1e9)


@record
class Reading:
    """The board's state at one moment, sampled outside the timed process; what the board does not tell is None or empty.

    ``frequency_mhz`` is the fastest cluster's. ``throttle`` holds what limits the board now. ``gpu_load`` is a share of 1.
    ``power_mw`` is the whole of what :class:`Power` says its scope covers. Where ``full`` is false, the sensors that cost a
    program to ask (``vcgencmd``) were left out of this reading, to keep the cost of watching small.
    """

    at_ms: int = number(0, 2**62)
    temperature_c: Optional[float] = number(-300.0, 1000.0)
    frequency_mhz: Optional[float] = number(0.0, 1e6)
    throttle: Optional[Tuple[str, ...]] = items(50, max_len=60)
    clusters: Tuple[ClusterClock, ...] = items(1000, default=())
    gpu_load: Optional[float] = number(0.0, 1.0, default=None)
    gpu_frequency_mhz: Optional[float] = number(0.0, 1e6, default=None)
    rails: Tuple[RailPower, ...] = items(200, default=())
    power_mw: Optional[float] = number(-1e9, 1e9, default=None)
    full: bool = True


@record
class Sampling:
    """What watching the board cost: ``cpu`` is the CPU time of the thread that read the sensors, and of the programs it asked,
    ÷ ``wall_ms``, the length of the timed part. ``readings_every_ms`` is what the cadence had come to at its end."""

    wall_ms: int = number(0, 2**62)
    cpu: float = number(0.0, 1e6)
    readings_every_ms: int = number(0, 2**62)


POWER_SCOPES = ("board", "rails", "pmic-partial", "package")


@record
class Power:
    """What the figures of power in a series mean. ``covers`` names what is in ``scope`` and what is not.

    ``idle_mw`` is the mean before anything was timed, with no worker running. ``counted_mw`` is the mean over the timed part by
    a counter of energy, where the board has one; without, it is that of the readings.
    """

    scope: str = text(choices=POWER_SCOPES)
    covers: str = text(max_len=400)
    idle_mw: Optional[float] = number(-1e9, 1e9)
    idle_absent: str = text(max_len=400, default="")
    counted_mw: Optional[float] = number(-1e9, 1e9, default=None)


@record
class Accuracy:
    """Top-1 on the bundle's evaluation set, counted on the device. ``predictions`` and ``labels`` are class indices, one an
    image; ``reused`` when the same artifact, runtime build and images had been scored there before."""

    images: int = number(1, 10_000_000)
    correct: int = number(0, 10_000_000)
    predictions: Tuple[int, ...] = items(10_000_000)
    labels: Tuple[int, ...] = items(10_000_000)
    evaluation: str = text(max_len=200)
    reused: bool


@record
class OperatorTime:
    """What one operator of the graph took in all inferences together: its kind, how often it ran, its time in ns."""

    name: str = text(max_len=400)
    kind: str = text(max_len=200)
    provider: str = text(max_len=120)
    calls: int = number(0, 2**62)
    total_ns: int = number(0, 2**62)


@record
class OperatorProfile:
    """``inferences`` profiled by the runtime itself, operators by falling time. Profiling slows it: compare shares, not times.
    ``left_out`` operators beyond those listed took ``left_out_ns``."""

    profiler: str = text(max_len=200)
    inferences: int = number(1, 10_000_000)
    operators: Tuple[OperatorTime, ...] = items(2000)
    left_out: int = number(0, 10_000_000, default=0)
    left_out_ns: int = number(0, 2**62, default=0)


@record
class Measurement:
    """One variant's share of a run; ``failure`` says why ``series`` is short or empty."""

    variant: Variant
    model: str = text(max_len=200)
    recipe: str = name_field()
    bundle_name: str = name_field(200)
    format: str = text(choices=FORMATS)
    scheme: str = text(choices=SCHEMES)
    artifact_sha256: str = sha256_field()
    artifact_bytes: int = number(1, MAX_BLOB_BYTES)
    batch: int = number(1, 4096)
    series: Tuple[Series, ...] = items(10_000)
    accuracy: Optional[Accuracy]
    accuracy_absent: str = text(max_len=400)
    failure: Optional[Refusal]
    profile: Optional[OperatorProfile] = None
    profile_absent: str = text(max_len=400, default="")


@record
class Run:
    """Everything one job measured and recorded. Lives in the device's spool until the host has acknowledged ``run_id``.

    ``governor`` is what held while the job ran; ``governor_before`` what a job that tuned the system found and put back."""

    schema: str = text(choices=(RUN_SCHEMA,))
    job: Job
    status: str = text(choices=("completed", "failed", "interrupted"))
    reason: str = text(max_len=4000)
    attempt: int = number(1, 1000)
    started_at: str = text(max_len=40)
    ended_at: str = text(max_len=40)
    facts: Facts
    governor: Optional[str] = text(max_len=60)
    measurements: Tuple[Measurement, ...] = items(500)
    governor_before: Optional[str] = text(max_len=60, default=None)


@record
class Verdict:
    """What the recorded facts allow one to say of a measurement; made by ``verdict.judge`` and redone at any time."""

    rules: int = number(1, 10**6)
    valid: bool
    reasons: Tuple[str, ...] = items(100, max_len=1000)
    warnings: Tuple[str, ...] = items(100, max_len=1000)
