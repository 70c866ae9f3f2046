"""Applications on every Python that a device may have: the same pixels of one picture, and answers from the active bundle."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_agents import wire
from edgevit.agentpack import agent_pyz
from edgevit.data import load_pixels
from scripts.pythons import environment_python
from tests.support.agent_bundle import AgentProcess, Signer, TinyBundle, make_bundle, outputs_onnx, tiny_onnx

pytestmark = pytest.mark.pythons

PREPARATIONS = {
    "imagenet": wire.Preprocessing(224, 224, 248, "bicubic", "center", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "squash": wire.Preprocessing(96, 96, 96, "bilinear", "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "border": wire.Preprocessing(128, 128, 128, "lanczos", "border", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

PREPARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, PIL
from device_agents import pictures, wire
for name, document in json.loads(sys.argv[3]).items():
    made = pictures.load_picture(sys.argv[2], wire.decode(wire.Preprocessing, document, name))
    np.save("{}/{}.npy".format(sys.argv[4], name), made)
print(PIL.__version__)
"""


@pytest.fixture(scope="module")
def bundle(signer: Signer) -> TinyBundle:
    return make_bundle(signer, evaluation=False)


def photograph(width: int, height: int) -> Image.Image:
    """What makes decoders differ: smooth colour, hard edges, noise."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    rng = np.random.default_rng(5)
    red, green = 127 + 120 * np.sin(x / 23), 127 + 120 * np.cos((x + y) / 37)
    blue = np.where((x // 40 + y // 30) % 2, 230, 20)
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.stack([red, green, blue], -1) + noise, 0, 255).astype(np.uint8))


KINDS = {
    "baseline.jpg": {"quality": 85},
    "fine.jpg": {"quality": 95, "subsampling": 0},
    "progressive.jpg": {"quality": 60, "progressive": True},
    "picture.png": {},
}


def test_host_and_device_make_the_same_pixels_of_a_file(version: str, tmp_path: Path) -> None:
    """Within one grey level, whatever Pillow the device's Python gets: libjpeg-turbo and the filters come with it."""
    pyz = tmp_path / "agent.pyz"
    pyz.write_bytes(agent_pyz().data)
    documents = json.dumps({name: wire.encode(p) for name, p in PREPARATIONS.items()})
    for number, (name, options) in enumerate(KINDS.items()):
        data = io.BytesIO()
        photograph(640 - 37 * number, 427 + 11 * number).save(data, name.rsplit(".")[1].replace("jpg", "jpeg"), **options)
        (tmp_path / name).write_bytes(data.getvalue())
        command = [str(environment_python(version)), "-c", PREPARE, str(pyz), str(tmp_path / name), documents, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        for kind, preparation in PREPARATIONS.items():
            there = np.load(tmp_path / f"{kind}.npy").astype(int)
            here = load_pixels(data.getvalue(), preparation).astype(int)
            worst = int(np.abs(there - here).max())
            assert worst <= 1, f"{name}, {kind}, Pillow {done.stdout.strip()}: {worst} grey levels"


def test_the_active_bundle_answers_on_it(version: str, tmp_path: Path, signer: Signer, bundle: TinyBundle) -> None:
    agent = AgentProcess(tmp_path / "root", str(environment_python(version))).upload()
    agent.allow(signer)
    agent.install(bundle)
    agent.call("activate", stdin={"variant": wire.encode(bundle.variant()), "policy": "test"})
    photograph(90, 61).save(tmp_path / "photo.jpg", quality=95)
    pixels = load_pixels(tmp_path / "photo.jpg", bundle.manifest.preprocessing)
    np.save(tmp_path / "pixels.npy", pixels)
    entry = str(agent.root / "python" / "edgevit_device.py")
    command = [agent.python, entry, "predict", "--json", "pixels.npy", "photo.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["images"]
    best = int(outputs_onnx(tiny_onnx(), pixels[None])[0].argmax())
    assert [row["top"][0]["index"] for row in rows] == [best, best]
    assert rows[0]["top"][0]["probability"] == pytest.approx(rows[1]["top"][0]["probability"], abs=0.02)
