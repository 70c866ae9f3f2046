"""The agent's pure parts: preparing pixels, comparing outputs, timing, external data, and the pack itself."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents import activate, golden, measure, pixels, serve, wire
from device_agents.errors import Refused, printable
from device_agents.runtimes import check_scheme
from device_agents.runtimes.onnx import refuse_external_data
from device_agents.serve import fit_result
from device_agents.store import Store
from edgevit.agentpack import LAUNCHER, agent_pyz
from tests.support import runs
from tests.support.agent_bundle import MEAN, SIDE, STD, make_signer, normalised, tiny_images, tiny_onnx

AGENT = Path(__file__).parent.parent.parent / "device_agents"
PREPROCESSING = wire.Preprocessing(SIDE, SIDE, SIDE, "bilinear", "center", MEAN, STD)
STRICT = wire.Tolerance(1e-3, 0.999, 0.01)


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_prepare(layout: str, dtype: str) -> None:
    images = tiny_images(3)
    x = pixels.prepare(images, PREPROCESSING, wire.TensorSpec("x", dtype, (1, 3, SIDE, SIDE), layout))
    expected: Any = images.transpose(0, 3, 1, 2) if dtype == "uint8" else normalised(images).astype(dtype)
    if layout == "NHWC":
        expected = expected.transpose(0, 2, 3, 1)
    assert x.dtype == dtype and x.flags.c_contiguous
    np.testing.assert_array_equal(x, expected)


def test_prepare_refuses_what_is_not_defined() -> None:
    with pytest.raises(Refused, match="int8"):
        pixels.prepare(tiny_images(1), PREPROCESSING, wire.TensorSpec("x", "int8", (1, 3, SIDE, SIDE), "NCHW"))


def test_batches_fill_up_the_last() -> None:
    found = [(index.tolist(), real) for index, real in pixels.batches(5, 2)]
    assert found == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]


def test_a_pickle_is_never_loaded() -> None:
    import io

    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Refused) as caught:
        pixels.parse_npy(out.getvalue(), "labels")
    assert caught.value.code == "blob-damaged"


# ---- golden ---------------------------------------------------------------------------------------------------------


def recorded() -> Any:
    return np.random.default_rng(3).normal(0, 4, (16, 10)).astype(np.float32)


def test_equal_outputs_pass() -> None:
    result = golden.compare(recorded(), recorded(), STRICT)
    assert result.passed and result.max_relative == 0 and result.reason == ""


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one value off": (lambda a: a + np.eye(16, 10, dtype=np.float32), "relative"),
    "reversed": (lambda a: a[:, ::-1], "class"),
    "all zero": (np.zeros_like, "cosine 0.0"),
    "not a number": (lambda a: np.where(np.eye(16, 10) == 1, np.nan, a), "not a number"),
    "infinite": (lambda a: np.where(np.eye(16, 10) == 1, np.inf, a), "infinite"),
    "other shape": (lambda a: a[:, :9], "shape"),
    "images in another order": (lambda a: np.roll(a, 1, 0), "class"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_outputs_fail(name: str) -> None:
    change, words = BAD[name]
    result = golden.compare(change(recorded()), recorded(), STRICT)
    assert not result.passed and words in result.reason
    assert wire.loads(wire.GoldenResult, wire.dumps(result), "x", 9999) == result


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_recorded_outputs_that_are_no_numbers_agree_with_nothing(value: float) -> None:
    bad = recorded()
    bad[2, int(bad[2].argmax())] = value
    result = golden.compare(recorded(), bad, wire.Tolerance(0.5, -1.0, 1e9))
    assert not result.passed and "recorded" in result.reason
    assert wire.loads(wire.GoldenResult, wire.dumps(result), "x", 9999) == result


def test_a_close_call_may_change_its_class() -> None:
    near = np.array([[1.0, 1.005, 0.0]], np.float32)
    flipped = np.array([[1.005, 1.0, 0.0]], np.float32)
    tolerance = wire.Tolerance(None, 0.99, 0.01)
    assert golden.compare(flipped, near, tolerance).passed
    assert not golden.compare(flipped, near, wire.Tolerance(None, 0.99, 0.001)).passed


# ---- measure --------------------------------------------------------------------------------------------------------


def test_both_lower_bounds_hold() -> None:
    calls: list[int] = []
    start = time.perf_counter()
    samples = measure.time_calls(calls.append, 1, 10, 0.05, 10.0, lambda n: None).samples_ns
    assert time.perf_counter() - start >= 0.05 and len(samples) == len(calls) >= 10
    assert len(measure.time_calls(calls.append, 1, 10, 0.0, 10.0, lambda n: None).samples_ns) == 10


def test_the_upper_bound_holds_and_one_sample_is_taken_at_least() -> None:
    nap = 0.01
    samples = measure.time_calls(lambda x: time.sleep(nap), 0, 1000, 0.0, 0.03, lambda n: None).samples_ns
    assert 1 <= len(samples) <= 4 and min(samples) >= nap * 1e9
    assert len(measure.time_calls(lambda x: time.sleep(nap), 0, 5, 0.0, 0.001, lambda n: None).samples_ns) == 1


@pytest.mark.parametrize(("calls", "kept", "stride"), [(10, 10, 1), (11, 6, 2), (100, 7, 16)])
def test_what_is_kept_is_spread_evenly_over_all_calls(calls: int, kept: int, stride: int) -> None:
    done: list[int] = []
    timed = measure.time_calls(done.append, 1, calls, 0.0, 10.0, lambda n: None, max_kept=10)
    assert len(done) == calls and (len(timed.samples_ns), timed.stride) == (kept, stride)
    assert len(range(0, calls, timed.stride)) == kept, "the first and every stride-th after it"


def test_windows_hold_every_call() -> None:
    done: list[int] = []

    def call(x: int) -> None:
        done.append(x)
        time.sleep(0.002)

    timed = measure.time_calls(call, 1, 1, 0.05, 10.0, lambda n: None, max_kept=4, window_seconds=0.01)
    assert sum(w.count for w in timed.windows) == len(done) > len(timed.samples_ns)
    assert 2 <= len(timed.windows) <= 6 and all(w.p50_ns <= w.max_ns for w in timed.windows)
    ends = [w.at_ms + w.duration_ms for w in timed.windows]
    assert all(abs(a - b.at_ms) <= 1 for a, b in zip(ends, timed.windows[1:], strict=False)), "a gap between windows"


def test_a_slow_model_does_not_warm_up_for_ever() -> None:
    plan = wire.RunPlan("p", 1, 1000, 0.0, 1, 0.0, 0.04, False)
    assert len(measure.warm_up(lambda x: time.sleep(0.01), 0, plan, lambda n: None)) <= 3


def test_kernel_files() -> None:
    stat = "cpu  300 0 50 9000 30 5 5 10 0 0\ncpu0 100 0 50 1000 30 5 5 10 0 0\ncpu1 200 0 0 8000 0 0 0 0 0 0\nintr 1 2\n"
    assert measure.parse_busy_cpu(stat, 100, [0]) == pytest.approx(1.70), "what runs on CPUs we may not use was counted"
    assert measure.parse_busy_cpu(stat, 100, [0, 1]) == pytest.approx(3.70)
    assert measure.parse_busy_cpu(stat, 100, [0, 7]) is None and measure.parse_busy_cpu("", 100, [0]) is None
    assert measure.parse_swapped_pages("pswpin 3\npswpout 4\nother 1\n") == 7
    assert measure.parse_swapped_pages("nothing 1\n") is None
    assert (measure.peak_mb() or 0) >= (measure.resident_mb() or 0) * 0.9 > 1


def test_between_two_moments() -> None:
    a = measure.Moment(0, 0, 1.0, 10.0, 5, {7: 1.0, 8: 2.0})
    b = measure.Moment(2 * 10**9, 2 * 10**9 + 3 * 10**8, 3.0, 13.0, 9, {7: 1.5, 9: 0.25})
    assert measure.compare_moments(a, b) == measure.Between(1.0, 0.5, 4, 300.0, 0.375)
    short = measure.Moment(10**8, 10**8, 1.1, 10.1, 5, {})
    assert measure.compare_moments(a, short).foreign_cpu is None, "ten ticks are no measurement"
    assert measure.compare_moments(a, short).waiting is None
    assert measure.parse_waited("671936 4280984 2\n") == pytest.approx(0.004280984)
    assert measure.parse_waited("") is None and measure.parse_waited("1 2") is None


# ---- runtimes -------------------------------------------------------------------------------------------------------


def external(where: str) -> bytes:
    """An ONNX file one of whose tensors lies in another file."""
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "inner", [], [], [tensor])
    nodes, initializers = [helper.make_node("Add", ["x", "w"], ["y"])], [tensor]
    if where == "attribute":
        nodes, initializers = [helper.make_node("Constant", [], ["y"], value=tensor)], []
    if where == "subgraph":
        nodes, initializers = [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], []
    graph = helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], initializers)
    if where == "sparse":
        sparse = onnx.SparseTensorProto(values=tensor, indices=tensor, dims=[1])
        graph = helper.make_graph(nodes, "g", [x], [], sparse_initializer=[sparse])
    model = helper.make_model(graph)
    if where == "function":
        function = helper.make_function("d", "f", [], ["y"], [helper.make_node("Constant", [], ["y"], value=tensor)], [])
        model = helper.make_model(helper.make_graph([], "g", [x], []), functions=[function])
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "sparse", "function"])
def test_external_data_is_refused_wherever_it_hides(where: str) -> None:
    with pytest.raises(Refused, match="another file"):
        refuse_external_data(external(where))


def test_ordinary_files_pass_and_torn_ones_do_not() -> None:
    refuse_external_data(tiny_onnx())
    for cut in range(1, len(tiny_onnx()), 97):
        try:
            refuse_external_data(tiny_onnx()[:cut])
        except Refused as e:
            assert "cut short" in str(e) or "not a protobuf" in str(e)


def test_known_wrong_schemes() -> None:
    check_scheme("litert", "int8-dynamic")
    check_scheme("tflite-runtime", "int8-static")
    for scheme in ("int8-dynamic", "int4-weights"):
        with pytest.raises(Refused) as caught:
            check_scheme("tflite-runtime", scheme)
        assert caught.value.code == "scheme-refused"


# ---- the pack -------------------------------------------------------------------------------------------------------


def test_the_pack_depends_on_its_sources_alone(tmp_path: Path) -> None:
    pack = agent_pyz()
    assert hashlib.sha256(pack.data).hexdigest() == pack.sha256
    code = "import edgevit.agentpack as a; print(a.agent_pyz().sha256)"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, cwd=AGENT.parent
        )
        assert done.stdout.strip() == pack.sha256, done.stderr
    (tmp_path / "a.pyz").write_bytes(pack.data)
    with zipfile.ZipFile(tmp_path / "a.pyz") as archive:
        names = archive.namelist()
        assert names == sorted(names) and archive.read("device_agents/launcher.txt").decode() == LAUNCHER
        assert all(n.endswith((".py", "launcher.txt")) for n in names)
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert len(pack.data) < 450_000, "the agent crosses slow links at every change of it"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


ALLOWED = {"numpy", "onnxruntime", "ai_edge_litert", "tflite_runtime", "PIL", "device_agents", "typing_extensions"}


def test_the_agent_needs_the_standard_library_numpy_and_a_runtime() -> None:
    for path in sorted(AGENT.rglob("*.py")):
        foreign = imports_of(path) - set(sys.stdlib_module_names) - ALLOWED
        assert not foreign, f"{path.name} imports {foreign}"


def test_commands_that_serve_no_model_import_neither_numpy_nor_a_runtime() -> None:
    modules = [
        "activate",
        "console",
        "install",
        "probe",
        "provision",
        "serve",
        "job",
        "spool",
        "supervise",
        "sshsig",
        "verdict",
    ]
    names = ", ".join("device_agents." + m for m in modules)
    code = f"import sys, {names}; print([m for m in {sorted(ALLOWED)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=AGENT.parent)
    assert done.stdout.strip() == "['device_agents']", done.stderr


def test_printable() -> None:
    text = printable("a\x00b\ud800c\n\té")
    assert text == "a\ufffdb\ufffdc\n\té"
    wire.decode(wire.Refusal, wire.encode(Refused("io-error", "\x00" * 30_000).to_wire()), "refusal")
    with pytest.raises(ValueError, match="not a refusal code"):
        Refused("made-up", "")


# ---- results --------------------------------------------------------------------------------------------------------


def test_a_result_that_is_too_big_to_come_home_is_made_smaller_evenly() -> None:
    """Twelve variants of a million samples are 84 MB; what is over the limit would hold up the spool for good."""
    run = runs.run(measurements=(runs.measurement(samples=20_000, processes=2), runs.measurement("int8-dynamic", samples=300)))
    assert fit_result(run) == wire.dumps(run)
    data = fit_result(run, 200_000)
    thinned = wire.loads(wire.Run, data, "run", 200_000)
    long, short = thinned.measurements
    for series, whole in zip(long.series, run.measurements[0].series, strict=True):
        assert series.stride > 1 and series.samples_ns == whole.samples_ns[:: series.stride]
    assert short == run.measurements[1] and thinned.status == run.status
    lost = wire.loads(wire.Run, fit_result(run, 10_000), "run", 10_000)
    assert (lost.status, lost.measurements, lost.job) == ("failed", (), run.job) and "can be brought home" in lost.reason


def test_a_result_that_the_disk_has_no_room_for_any_more_is_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else minutes of load are measured three times and lost three times."""

    class Filling(Store):
        def free_bytes(self) -> int:
            return 5_000_000 if not made else 500_000

    made: list[wire.Run] = []

    def attempt(_store: Store, _agent: str, job: wire.Job, *_: Any) -> wire.Run:
        made.append(dataclasses.replace(runs.run(measurements=(runs.measurement(samples=40_000, processes=2),)), job=job))
        return made[0]

    monkeypatch.setattr(serve, "_attempt", attempt)
    store = Filling(tmp_path / "root")
    store.create()
    job = dataclasses.replace(runs.run().job, run_id="long")
    store.write(store.queue_path("long"), wire.dumps(job))
    serve._work(store, "a" * 64, "long")
    data = store.spool_path("long", "run").read_bytes()
    assert len(wire.dumps(made[0])) > 600_000 and len(data) < 500_000 - serve.BESIDE_BYTES
    assert wire.loads(wire.Run, data, "run", len(data)).measurements[0].series[0].stride > 1


class Asked:
    """A console that hands one request over."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request

    def read_json(self, what: str) -> dict[str, Any]:
        return self._request


def test_who_may_sign_is_changed_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else of two at once, the second to write brings back the key that the first revoked."""
    store, line = Store(tmp_path / "root"), make_signer(tmp_path, "k").line()
    activate.allow(store, Asked({"lines": [line]}))  # type: ignore[arg-type]
    monkeypatch.setattr(activate, "SIGNERS_WAIT_S", 0.0)
    other = os.open(store.root, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="who may sign") as caught:
        activate.allow(store, Asked({"lines": [], "replace": True}))  # type: ignore[arg-type]
    assert caught.value.code == "busy" and activate.read_signers(store) == [line]
    os.close(other)
    activate.allow(store, Asked({"lines": [], "replace": True}))  # type: ignore[arg-type]
    assert activate.read_signers(store) == []
