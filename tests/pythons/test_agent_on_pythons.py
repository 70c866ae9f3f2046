"""The agent on every Python that a device may have, each with the runtimes that Python really gets.

The environments are made by ``python scripts/pythons.py``. Where one is missing the case is skipped with the command to
type, and under continuous integration (``CI`` set) it fails.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from device_agents import wire
from scripts.pythons import REQUIREMENTS, environment_python, find_interpreter
from tests.support.agent_bundle import (
    FAST_PLAN,
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    make_bundle,
    make_job,
    tiny_onnx,
)
from tests.support.wheels import make_wheel, provision, repack

pytestmark = pytest.mark.pythons
AGENT = Path(__file__).parent.parent.parent / "device_agents"


@pytest.fixture(scope="module")
def bundle(signer: Signer) -> TinyBundle:
    return make_bundle(signer, tflite=True)


def expected_runtimes(version: str) -> dict[str, str]:
    """runtime → exact version where the requirements pin one, else empty."""
    names = {"onnxruntime": "onnxruntime", "ai-edge-litert": "litert", "tflite-runtime": "tflite-runtime"}
    found = {}
    for requirement in REQUIREMENTS[version]:
        for package, runtime in names.items():
            if requirement.startswith(package):
                found[runtime] = requirement.partition("==")[2]
    return found


def test_the_whole_path(version: str, tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    agent = AgentProcess(tmp_path / "root", str(environment_python(version))).upload()
    facts = wire.decode(wire.Facts, agent.call("probe"), "facts")
    assert facts.python.rsplit(".", 1)[0] == version
    there = {r.runtime: r for r in facts.runtimes}
    wanted = expected_runtimes(version)
    assert set(there) == set(wanted), facts.absent
    for runtime, exact in wanted.items():
        assert not exact or there[runtime].version == exact
        cpu = "CPUExecutionProvider" if runtime == "onnxruntime" else "XNNPACK"
        assert any(p.name == cpu and p.proven for p in there[runtime].providers), there[runtime]
    agent.allow(signer)
    assert agent.install(bundle)["installed"]
    assert agent.install(bundle)["received_bytes"] == 0
    assert agent.call("activate", stdin={"variant": wire.encode(bundle.variant()), "policy": "test"})["changed"]
    tflite = [r for r in wanted if r != "onnxruntime"]
    variants = [bundle.variant(), *(bundle.variant("tiny-tflite-fp32", r) for r in tflite)]
    plan = dataclasses.replace(FAST_PLAN, profile_ops=True, sustained=True, affinity=(min(os.sched_getaffinity(0)),))
    assert agent.call("submit", stdin=wire.encode(make_job(bundle, "run", *variants, plan=plan)))["queued"]
    run = agent.follow("run")
    assert run.status == "completed" and run.reason == ""
    for measurement in run.measurements:
        assert measurement.failure is None
        (series,) = measurement.series
        assert series.golden.passed and len(series.samples_ns) == 8
        assert measurement.accuracy and measurement.accuracy.images == 32
        assert sum(w.count for w in series.windows) == 8 and series.affinity == plan.affinity
        assert (measurement.profile is not None) == (measurement.variant.runtime == "onnxruntime")
        assert measurement.profile is None or "Gemm" in [o.kind for o in measurement.profile.operators]
    assert run.measurements[0].accuracy and run.measurements[0].accuracy.correct == 29
    assert agent.call("ack", "run")["acknowledged"]


def test_wrong_models_are_found_on_it(version: str, tmp_path: Path, signer: Signer) -> None:
    agent = AgentProcess(tmp_path / "root", str(environment_python(version))).upload()
    agent.allow(signer)
    bad = make_bundle(signer, onnx_model=tiny_onnx(zeroed=True))
    agent.install(bad)
    agent.call("submit", stdin=wire.encode(make_job(bad, "bad")))
    failure = agent.follow("bad").measurements[0].failure
    assert failure and failure.code == "golden-mismatch"


def test_a_file_too_new_for_it_is_refused_with_both_versions(version: str, tmp_path: Path, signer: Signer) -> None:
    import onnx

    newer = onnx.load_model_from_string(tiny_onnx())
    newer.ir_version = 99
    agent = AgentProcess(tmp_path / "root", str(environment_python(version))).upload()
    agent.allow(signer)
    bundle = make_bundle(signer, onnx_model=newer.SerializeToString())
    agent.install(bundle)
    with pytest.raises(AgentRefused, match=r"runtime-too-old: the file needs ONNX IR version 99, .* reads at most 1"):
        agent.call("activate", stdin={"variant": wire.encode(bundle.variant()), "policy": "test"})


def test_schemes_that_this_runtime_gets_wrong_are_refused(version: str, tmp_path: Path, signer: Signer) -> None:
    if "tflite-runtime" not in expected_runtimes(version):
        version_has_it = [v for v in REQUIREMENTS if "tflite-runtime" in expected_runtimes(v)]
        assert version_has_it, "no environment has tflite-runtime any more"
        return

    def as_dynamic(document: dict[str, object]) -> None:
        document["artifacts"][1]["scheme"] = "int8-dynamic"  # type: ignore[index]

    agent = AgentProcess(tmp_path / "root", str(environment_python(version))).upload()
    agent.allow(signer)
    bundle = make_bundle(signer, tflite=True, change=as_dynamic)
    agent.install(bundle)
    variant = bundle.variant("tiny-tflite-fp32", "tflite-runtime")
    with pytest.raises(AgentRefused) as caught:
        agent.call("activate", stdin={"variant": wire.encode(variant), "policy": "test"})
    assert caught.value.code == "scheme-refused"
    agent.call("submit", stdin=wire.encode(make_job(bundle, "dynamic", variant)))
    failure = agent.follow("dynamic").measurements[0].failure
    assert failure and failure.code == "scheme-refused" and "garbage" in failure.message


def test_it_makes_an_environment_from_wheels_alone(version: str, tmp_path: Path) -> None:
    """By the interpreter itself, with the pip that this Python gets; then the environment grows."""
    interpreter = find_interpreter(version)
    assert interpreter is not None
    site = next(environment_python(version).parent.parent.glob("lib/python*/site-packages"))
    pip = repack("pip", tmp_path, site)
    one = make_wheel(tmp_path / "w", "one-1-py3-none-any.whl", files={"one.py": "x = 1"})
    two = make_wheel(tmp_path / "w", "two-1-py3-none-any.whl", files={"two.py": "y = 2"})
    agent = AgentProcess(tmp_path / "root", str(interpreter), {"PIP_NO_INDEX": "0"}).upload()
    assert provision(agent, [pip, one])[0]["made"]
    assert not provision(agent, [pip, one])[0]["made"]
    assert provision(agent, [pip, one, two])[0]["received_bytes"] == pip.size + two.size
    python = agent.root / "venv" / "bin" / "python"
    code = "import one, two, sys; print(one.x + two.y, '%d.%d' % sys.version_info[:2])"
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["3", version]
    facts = wire.decode(wire.Facts, agent.call("probe"), "facts")
    assert facts.environment is not None and len(facts.environment.wheels) == 3
    assert facts.soabi and facts.soabi.startswith("cpython-" + version.replace(".", ""))


def test_every_module_compiles_on_it(version: str) -> None:
    files = sorted(str(p) for p in AGENT.rglob("*.py"))
    code = "import sys\nfor f in sys.argv[1:]: compile(open(f, encoding='utf-8').read(), f, 'exec')"
    done = subprocess.run([str(environment_python(version)), "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_pythons_say_that_they_are_old() -> None:
    """The launcher's text must parse where nothing else of the agent does."""
    from edgevit.agentpack import BOOTSTRAP, LAUNCHER

    for text in (LAUNCHER, BOOTSTRAP):
        ast.parse(text, feature_version=(3, 4))
