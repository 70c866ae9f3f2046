"""What the build tests share: labelled images in class folders, a signing key, and bundles built once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import signing
from edgevit.build import BuildRequest, build_bundle
from edgevit.bundle import Bundle
from edgevit.model import ModelSource
from edgevit.profile import load_profile
from edgevit.recipe import load_recipe

CLASSES = [f"colour{i}" for i in range(10)]


class Recorder:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        self.said.append(text)

    def advance(self, key: str, done: float, text: str = "") -> None:
        self.said.append(f"{key} {done}")

    def finish(self, key: str, text: str = "") -> None:
        self.said.append(text)


def write_images(root: Path, count: int = 24) -> Path:
    """Class folders of seeded colour fields."""
    from PIL import Image

    from device_agents.wire import Preprocessing
    from edgevit.golden import synthetic_images

    shape = Preprocessing(48, 48, 48, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for i, pixels in enumerate(synthetic_images(count, shape)):
        place = root / CLASSES[i % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "id"
    signing.make_key(path, "a test")
    return path


@pytest.fixture(scope="session")
def build_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One EDGEVIT_HOME for the builds of a session, so that float exports are shared as a person's are."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVIT_HOME", str(place))
        yield place


Build = Callable[..., Bundle]


@pytest.fixture
def build(build_home: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setenv("EDGEVIT_HOME", str(build_home))
    monkeypatch.delenv("EDGEVIT_RUNTIMES", raising=False)
    count = [0]

    def run(recipe: str, formats: tuple[str, ...] = ("onnx",), **more: Any) -> Bundle:
        progress = more.pop("progress", Recorder())
        source = more.pop("source", ModelSource("tests.support.models:tiny_vit", random_weights=True))
        profiles = tuple(load_profile(p) for p in more.pop("profiles", ("raspberry-pi-4b",)))
        request = BuildRequest(source, load_recipe(recipe), profiles, formats, **more)
        count[0] += 1
        return build_bundle(request, tmp_path / f"bundle{count[0]}", lambda d: signing.sign(d, key), progress)

    return run


def blob(bundle: Bundle, sha256: str) -> Any:
    import io

    return np.load(io.BytesIO(bundle.blob_path(sha256).read_bytes()), allow_pickle=False)


def old_onnxruntime() -> Path | None:
    """A Python 3.8 with onnxruntime 1.19.2, where the checkout's environment has one."""
    python = Path(__file__).resolve().parents[2] / ".cache" / "pythons" / "3.8" / "bin" / "python"
    return python if python.exists() and sys.platform == "linux" else None
