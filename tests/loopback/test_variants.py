"""Variants measured, chosen and activated through the command line and a real agent in processes of its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from device_agents import wire
from edgevit import places
from edgevit.cli import run_cli
from edgevit.plans import PLANS
from edgevit.results.store import open_store
from edgevit.select import POLICIES
from tests.support.agent_bundle import FAST_PLAN, AgentProcess, Signer, make_bundle, make_job, tiny_onnx
from tests.support.cli import Cli, active
from tests.support.judged import valid

FLOAT, SLOW, WRONG, BROKEN = "tiny-onnx-fp32", "tiny-onnx-int8-dynamic", "tiny-onnx-int8-static", "tiny-onnx-fp16"


@functools.cache
def slow_onnx() -> bytes:
    """The tiny model followed by 400 products with the identity: the same answers, many times the time."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load_model_from_string(tiny_onnx())
    model.graph.initializer.append(numpy_helper.from_array(np.eye(10, dtype=np.float32), "eye"))
    model.graph.node[-1].output[0] = "y0"
    for i in range(400):
        model.graph.node.append(helper.make_node("MatMul", [f"y{i}", "eye"], [f"y{i + 1}" if i < 399 else "y"]))
    return bytes(model.SerializeToString())


@pytest.fixture
def bundle(operator: Signer, tmp_path: Path) -> Path:
    """Float; an int8 that is slower than it; an int8 that answers otherwise; a half-precision one that is no model."""

    def cut(document: dict[str, Any]) -> None:
        (broken,) = (a for a in document["artifacts"] if a["name"] == BROKEN)
        broken["output"]["name"] = "nothing"

    more = {SLOW: ("int8-dynamic", slow_onnx()), WRONG: ("int8-static", tiny_onnx(1)), BROKEN: ("fp16", tiny_onnx())}
    return make_bundle(operator, more=more, change=cut).write(tmp_path / "variants")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short series, and whatever else runs on this machine makes none of them INVALID."""
    monkeypatch.setitem(PLANS, "quick", dataclasses.replace(FAST_PLAN, processes=2))
    monkeypatch.setattr("device_agents.verdict.judge", valid)


def measure(cli: Cli, bundle: Path) -> dict[str, Any]:
    said = cli("bench", bundle, "local", "--variants", "--plan", "quick", "--threads", 1, "--json")
    assert said.code == 0, said.err
    document: dict[str, Any] = json.loads(said.out)
    return document


def test_measured_chosen_activated_and_kept(cli: Cli, bundle: Path) -> None:
    cli("deploy", bundle, "local", "--select", "fastest").refused(
        1, "was not measured there yet", f"edgevit bench {bundle} local --variants"
    )
    found = measure(cli, bundle)
    rows = {row["artifact"]: row for row in found["rows"]}
    assert set(rows) == {FLOAT, SLOW, WRONG, BROKEN}
    assert rows[SLOW]["p50_ms"] > rows[FLOAT]["p50_ms"] and rows[BROKEN]["failure"]
    assert {c["policy"]: c["variant"]["artifact"] for c in found["choices"]} == dict.fromkeys(POLICIES, FLOAT)
    dropped = {d["variant"]["artifact"]: d["reason"] for d in found["choices"][0]["dropped"]}
    assert dropped[SLOW].startswith("int8 slower than float here: ")
    assert "points of top-1" in dropped[WRONG] and dropped[BROKEN].startswith("worker-failed")

    said = cli("deploy", bundle, "local", "--select", "fastest", "--dry-run")
    assert said.code == 0 and not (places.local_root() / "active.json").exists()
    said = cli("deploy", bundle, "local", "--select", "fastest")
    run_id = rows[FLOAT]["run_id"]
    assert said.code == 0 and f"fastest: {FLOAT}:onnxruntime:CPUExecutionProvider:1, " in said.out and run_id in said.out
    assert f"dropped {SLOW}:" in said.out and "not held: top-1 was counted on 32 images" in said.out
    assert (active()["variant"]["artifact"], active()["policy"]) == (FLOAT, f"fastest by {run_id}")
    before = active()
    again = cli("deploy", bundle, "local", "--select", "fastest")
    assert again.code == 0 and "was there" in again.out and active() == before
    with open_store() as store:
        (kept,) = store.choices()
    assert kept.choice.runs == (run_id,) and kept.choice.variant.artifact == FLOAT

    listed = cli("results", "choices")
    assert listed.code == 0 and "fastest" in listed.out
    shown = cli("results", "choices", kept.id)
    assert shown.code == 0 and run_id in shown.out and "int8 slower than float here" in " ".join(shown.out.split())
    assert json.loads(cli("results", "choices", "--json").out)["choices"][0]["id"] == kept.id
    cli("results", "choices", "nosuch").refused(2, "no choice named 'nosuch'", "edgevit results choices")


def test_the_table_names_every_variant_every_policy_and_why_not(cli: Cli, bundle: Path) -> None:
    assert run_cli(["bench", str(bundle), "local", "--variants", "--plan", "quick", "--threads", "1", "--max-loss", "100"]) == 0
    with open_store() as store:
        batch = store.batches()[0].id
    said = cli("results", "list")
    assert batch in said.out
    found = cli("bench", bundle, "local", "--variants", "--plan", "quick", "--threads", 1, "--max-loss", 100)
    assert max(map(len, found.out.splitlines())) <= 100
    for name in (FLOAT, SLOW, WRONG, BROKEN, *POLICIES):
        assert name in found.out
    assert "points of top-1" not in found.out, "100 points may be lost"
    assert "int8 slower than float here" in " ".join(found.out.split()) and "edgevit deploy BUNDLE TARGET --select" in found.err


def test_a_variant_by_name_needs_no_measurement(cli: Cli, bundle: Path) -> None:
    said = cli("deploy", bundle, "local", "--select", f"{SLOW}:onnxruntime", "--json")
    assert said.code == 0 and active()["policy"] == f"selected: {SLOW}:onnxruntime"
    assert "choice" not in json.loads(said.out)["targets"][0]
    said = cli("deploy", bundle, "local", "--select", "smalest")
    assert said.code == 2 and "no variant 'smalest'" in said.err
    with open_store() as store:
        assert store.choices() == []


def test_a_persons_image_is_answered_by_the_variant_that_is_active(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    """Not by the first that runs, unless nothing of the bundle is active; classes without a name by their number."""
    made = make_bundle(operator, tflite=True, change=lambda document: document.update(labels=None))
    bundle = made.write(tmp_path / "bundle")
    assert made.manifest.labels is not None
    (bundle / "blobs" / made.manifest.labels.sha256).unlink()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    asked = ("predict", bundle, "local", tmp_path / "image.png")
    said = cli(*asked)
    assert said.code == 0 and "(tiny-onnx-fp32 in onnxruntime on local)" in said.err, said.err
    assert len(re.findall(r"^ +\d+\.\d %  class \d$", said.out, re.MULTILINE)) == 5, said.out
    request = {"variant": wire.encode(made.variant("tiny-tflite-fp32", "litert")), "policy": "test", "allow_older": False}
    assert AgentProcess(places.local_root()).call("activate", stdin=request)["changed"]
    assert "(tiny-tflite-fp32 in litert on local)" in cli(*asked).err


def test_series_go_round_by_round(operator: Signer, tmp_path: Path) -> None:
    """A B C A B C: what drifts over the minutes meets every variant alike."""
    made = make_bundle(operator, more={SLOW: ("int8-dynamic", slow_onnx()), WRONG: ("int8-static", tiny_onnx(1))})
    agent = AgentProcess(tmp_path / "root").upload()
    agent.allow(operator)
    agent.install(made)
    names = (FLOAT, SLOW, WRONG)
    plan = dataclasses.replace(FAST_PLAN, processes=2, accuracy=False)
    job = make_job(made, "rounds", *(made.variant(name) for name in names), plan=plan)
    agent.call("submit", stdin=wire.encode(job))
    lines = agent.messages("follow", "rounds")
    begun = [
        line["text"].split(" on ")[0] for line in lines if line["type"] == "progress" and " on onnxruntime" in line["text"]
    ]
    assert [name for name, _ in itertools.groupby(begun)] == [*names, *names]
    run = wire.decode(wire.Run, lines[-1]["value"], "run")
    assert [[s.process for s in m.series] for m in run.measurements] == [[0, 1]] * 3
