"""Applications on the device: the active bundle by its stable path, while deployments change it underneath."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents import api, wire
from device_agents.errors import Refused
from tests.support.agent_bundle import (
    AgentProcess,
    AgentRefused,
    Signer,
    TinyBundle,
    make_bundle,
    npy,
    outputs_onnx,
    tiny_images,
    tiny_onnx,
)


def labelled(signer: Signer, version: int) -> TinyBundle:
    """The tiny model with class names that tell its version."""
    names = json.dumps([f"version {version}, class {i}" for i in range(10)]).encode()
    return make_bundle(signer, version=version, evaluation=False, extra_blob=names)


def activate(agent: AgentProcess, bundle: TinyBundle) -> None:
    agent.install(bundle, allow_older=True)
    request = {"variant": wire.encode(bundle.variant()), "policy": "test", "allow_older": True}
    assert agent.call("activate", stdin=request)["changed"]


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> tuple[AgentProcess, TinyBundle]:
    """An agent with version 3 active, for tests that leave it as it is."""
    agent = AgentProcess(tmp_path_factory.mktemp("device") / "root").upload()
    agent.allow(signer)
    bundle = labelled(signer, 3)
    activate(agent, bundle)
    return agent, bundle


def run_in(agent: AgentProcess, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of somebody's own, started elsewhere, that knows nothing but the documented path."""
    code = f"import sys\nsys.path.insert(0, {str(agent.root / 'python')!r})\n" + textwrap.dedent(program)
    return subprocess.run([agent.python, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd="/")


def test_a_program_of_its_own_imports_by_the_stable_path_and_follows_an_activation(
    agent: AgentProcess, signer: Signer, tmp_path: Path
) -> None:
    one, two = labelled(signer, 1), labelled(signer, 2)
    activate(agent, one)
    agent.install(two)
    np.save(tmp_path / "image.npy", tiny_images()[0])
    done = run_in(
        agent,
        """
        import subprocess
        from edgevit_device import load_active, Refused
        model = load_active()
        assert model.size == (16, 16) and len(model.labels) == 10 and model.active.bundle_version == 1
        print(model.classify(sys.argv[1], top=1)[0].label)
        subprocess.run(sys.argv[3:], input=sys.argv[2].encode(), check=True, capture_output=True)
        print(model.classify(sys.argv[1], top=1)[0].label, "|", model.active.bundle_version, "|", model.reload())
        """,
        str(tmp_path / "image.npy"),
        json.dumps({"variant": wire.encode(two.variant()), "policy": ""}) + "\n",
        *agent.argv("activate"),
    )
    best = int(outputs_onnx(tiny_onnx(), tiny_images(1))[0].argmax())
    assert done.stdout.splitlines() == [f"version 1, class {best}", f"version 2, class {best} | 2 | False"], done.stderr


def test_answers_while_deployments_swap_the_version_underneath(agent: AgentProcess, signer: Signer) -> None:
    """Two threads classify one image after the other while two bundles take turns and what is not needed is collected."""
    bundles = [labelled(signer, 1), labelled(signer, 2)]
    for bundle in bundles:
        activate(agent, bundle)
    model = api.load_active(agent.root)
    images = tiny_images(8, 3)
    expected = outputs_onnx(tiny_onnx(), images)
    stop, problems, seen = threading.Event(), [], set()

    def classify() -> None:
        count = 0
        while not stop.wait(0.002):
            try:
                image = count % len(images)
                guesses = model.classify(images[image], top=10)
                version = {b.digest: b.manifest.version for b in bundles}[guesses[0].bundle]
                assert [g.label for g in guesses] == [f"version {version}, class {g.index}" for g in guesses]
                assert [g.index for g in guesses] == list(np.argsort(-expected[image], kind="stable"))
                seen.add(version)
            except Exception as e:  # noqa: BLE001 - whatever it is, the test names it
                problems.append(e)
                return
            count += 1

    threads = [threading.Thread(target=classify) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            activate(agent, bundles[turn % 2])
            agent.call("gc")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert problems == [] and seen == {1, 2} and model.problem == ""


def test_an_activation_that_cannot_be_loaded_leaves_the_old_one_at_work_and_says_so(
    agent: AgentProcess, signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = labelled(signer, 1), labelled(signer, 2)
    activate(agent, one)
    model = api.load_active(agent.root)
    activate(agent, two)
    assert two.manifest.labels is not None
    (agent.root / "blobs" / two.manifest.labels.sha256).write_bytes(b"[" + b" " * (two.manifest.labels.size - 2) + b"]")
    image = tiny_images()[0]
    for _ in range(3):
        assert model.classify(image)[0].label.startswith("version 1")
    assert "blob-damaged" in model.problem
    assert len([r for r in caplog.records if r.name == "edgevit"]) == 1, "once for each activation"
    with pytest.raises(Refused) as refused:
        model.reload()
    assert refused.value.code == "blob-damaged" and model.classify(image)[0].label.startswith("version 1")
    agent.call("rollback")
    assert model.classify(image)[0].label.startswith("version 1") and model.problem == ""


def test_what_an_image_may_be(
    at_work: tuple[AgentProcess, TinyBundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    model = api.load_active(at_work[0].root)
    image = tiny_images()[0]
    answer = model.classify(image)
    np.save(tmp_path / "one.npy", image)
    np.save(tmp_path / "batch.npy", image[None])
    assert model.classify(tmp_path / "one.npy") == model.classify(str(tmp_path / "batch.npy")) == answer
    Image.fromarray(image).save(tmp_path / "one.png")
    assert model.classify(tmp_path / "one.png") == model.classify((tmp_path / "one.png").read_bytes()) == answer
    assert model.classify(Image.fromarray(image)) == answer
    assert [len(row) for row in model.classify_many([image, tmp_path / "one.png"], top=3)] == [3, 3]
    assert model.classify_many([]) == []
    large = np.repeat(np.repeat(image, 3, 0), 3, 1)
    assert sum(g.probability for g in model.classify(large, top=10)) == pytest.approx(1.0, abs=1e-4)
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "text.npy").write_text("no array")
    bad: list[Any] = [
        image.astype(np.float32),
        image[:, :, :2],
        7,
        tmp_path / "absent.png",
        tmp_path / "text.jpg",
        tmp_path / "text.npy",
    ]
    for source in bad:
        with pytest.raises(Refused) as refused:
            model.classify(source)
        assert refused.value.code == "bad-image"
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert model.classify(image) == answer, "pixels of the model's own size need no Pillow"
    for source in (tmp_path / "one.png", large):
        with pytest.raises(Refused) as refused:
            model.classify(source)
        assert refused.value.code == "no-pillow" and "--with-pillow" in refused.value.hint


def test_the_program_in_the_documentation_runs(at_work: tuple[AgentProcess, TinyBundle], tmp_path: Path) -> None:
    agent, _ = at_work
    (tmp_path / "photo.npy").write_bytes(npy(tiny_images()[0]))
    for name, arguments in (("applications.md", ["photo.npy"]), ("tutorial.md", [])):
        text = (Path(__file__).parents[2] / "docs" / name).read_text("utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        code = code.replace("~/.edgevit", str(agent.root)).replace("photo.jpg", "photo.npy")
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=str(tmp_path))
        assert "version 3, class" in done.stdout, done.stderr


def test_without_an_activation_and_without_a_root_it_says_what_to_do(agent: AgentProcess, tmp_path: Path) -> None:
    for root in (agent.root, tmp_path / "nowhere"):
        with pytest.raises(Refused) as refused:
            api.load_active(root)
        assert refused.value.code == "no-active" and "edgevit deploy" in refused.value.hint
    with pytest.raises(AgentRefused, match="no-active"):
        agent.call("active")


def test_other_languages_find_the_files(at_work: tuple[AgentProcess, TinyBundle]) -> None:
    agent, bundle = at_work
    told = agent.call("active")
    entry = str(agent.root / "python" / "edgevit_device.py")
    done = subprocess.run([sys.executable, entry, "active"], capture_output=True, text=True, timeout=60, cwd="/", check=True)
    assert json.loads(done.stdout) == told
    assert Path(told["model"]).read_bytes() == tiny_onnx()
    assert json.loads(Path(told["labels"]).read_bytes())[0] == "version 3, class 0"
    assert Path(told["manifest"]).read_bytes() == bundle.manifest_bytes
    assert (told["schema"], told["version"], told["format"], told["batch"]) == ("edgevit.active/1", 3, "onnx", 1)
    assert told["input"]["shape"] == [1, 3, 16, 16] and told["preprocessing"]["height"] == 16
    # Without any program: active.json names the bundle and the artifact, its manifest the blob.
    active = json.loads((agent.root / "active.json").read_bytes())["active"]["variant"]
    manifest = json.loads((agent.root / "bundles" / active["bundle"] / "manifest.json").read_bytes())
    (artifact,) = [a for a in manifest["artifacts"] if a["name"] == active["artifact"]]
    assert str(agent.root / "blobs" / artifact["blob"]["sha256"]) == told["model"]


def test_people_on_the_device_predict_images(at_work: tuple[AgentProcess, TinyBundle], tmp_path: Path) -> None:
    entry = str(at_work[0].root / "python" / "edgevit_device.py")
    (tmp_path / "a.npy").write_bytes(npy(tiny_images()[0]))
    from PIL import Image

    Image.fromarray(tiny_images()[1]).save(tmp_path / "b.png")

    def predict(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, entry, "predict", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=str(tmp_path))

    told = predict("a.npy", "b.png", "--top", "2")
    best = outputs_onnx(tiny_onnx(), tiny_images(2)).argmax(1)
    lines = told.stdout.splitlines()
    assert [lines[0], lines[3]] == ["a.npy", "b.png"] and len(lines) == 6, told.stderr
    assert lines[1].endswith(f"class {best[0]}") and lines[4].endswith(f"class {best[1]}")
    document = json.loads(predict("b.png", "--json").stdout)
    assert document["images"][0]["top"][0]["index"] == best[1] and len(document["images"][0]["top"]) == 5
    refused = predict("absent.npy")
    assert refused.returncode == 1 and refused.stderr.startswith("bad-image: absent.npy: No such file")
    assert predict().returncode == 2


def test_any_python_that_starts_it_goes_on_in_the_provisioned_environment_and_a_damaged_agent_is_not_imported(
    agent: AgentProcess, signer: Signer, tmp_path: Path
) -> None:
    activate(agent, labelled(signer, 1))
    said = tmp_path / "said"
    environment = agent.root / "venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    (environment / "python").chmod(0o755)
    entry = agent.root / "python" / "edgevit_device.py"
    subprocess.run([sys.executable, str(entry), "predict", "x.npy"], check=True, timeout=60)
    assert said.read_text().split() == [str(entry), "predict", "x.npy"]
    (pyz,) = (agent.root / "agent").glob("*.pyz")
    pyz.write_bytes(pyz.read_bytes() + b"\0")
    done = run_in(agent, "import edgevit_device")
    assert done.returncode != 0 and "sends it again" in done.stderr


def test_the_entry_is_written_once_and_private(agent: AgentProcess, signer: Signer) -> None:
    one, two = labelled(signer, 1), labelled(signer, 2)
    activate(agent, one)
    paths = [agent.root / "python" / name for name in ("edgevit_device.py", "agent")]
    before = [os.stat(path) for path in paths]
    activate(agent, two)
    agent.call("rollback")
    assert [os.stat(path).st_ino for path in paths] == [info.st_ino for info in before]
    assert all(info.st_mode & 0o077 == 0 for info in before)
