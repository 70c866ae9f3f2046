"""Models and weights: what the weights say is taken, what is wrong is named with the way out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevit.cache import Cache
from edgevit.errors import ModelError, UnknownName
from edgevit.model import ModelSource, load_model
from edgevit.torchsetup import import_timm, import_torch

VIT = "vit_tiny_patch16_224"
SUPPORT = "tests.support.models"


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 7-class ViT for 64-pixel images, saved by safetensors as a person's training would."""
    from safetensors.torch import save_file

    timm, torch = import_timm(), import_torch()
    torch.manual_seed(3)
    model = timm.create_model(VIT, num_classes=7, img_size=64, depth=2)
    path = tmp_path_factory.mktemp("weights") / "birds.safetensors"
    save_file(model.state_dict(), path)
    return path


def source(weights: Path | None = None, name: str = VIT, **more: Any) -> ModelSource:
    arguments = {"depth": 2} if name == VIT else {}
    return ModelSource(name, weights=weights, model_args=arguments, **more)


def test_class_count_and_image_size_come_from_the_weights(finetuned: Path, tmp_path: Path) -> None:
    names = ["robin", "wren", "crow", "jay", "tit", "owl", "kite"]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(names) + "\n")
    model = load_model(source(finetuned, labels=labels))
    assert model.info.classes == 7
    assert (model.preprocessing.height, model.preprocessing.width) == (64, 64)
    assert model.labels == tuple(names)
    assert "7" in model.info.overrides["num_classes"] and "64" in model.info.overrides["img_size"]
    assert model.info.parameters > 0 and (model.info.macs or 0) > model.info.parameters


def test_labels_as_json_by_index(finetuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({str(i): f"class {i}" for i in reversed(range(7))}))
    assert load_model(source(finetuned, labels=path)).labels == tuple(f"class {i}" for i in range(7))
    path.write_text(json.dumps(["a", "b"]))
    with pytest.raises(ModelError, match=r"names 2 classes, .* has 7"):
        load_model(source(finetuned, labels=path))


@pytest.mark.parametrize("wrapper", ["state_dict_ema", "state_dict", "model", None])
def test_checkpoints_of_training_scripts(finetuned: Path, tmp_path: Path, wrapper: str | None) -> None:
    from safetensors.torch import load_file

    torch = import_torch()
    state = {f"module.{k}": v for k, v in load_file(finetuned).items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert load_model(source(path)).info.classes == 7


def test_a_checkpoint_with_code_needs_leave(finetuned: Path, tmp_path: Path) -> None:
    torch = import_torch()
    model = load_model(source(finetuned)).module
    path = tmp_path / "whole.pth"
    torch.save(model, path)
    with pytest.raises(ModelError, match="run code") as caught:
        load_model(source(path))
    assert "--unsafe-pickle" in caught.value.hint
    assert load_model(source(path, unsafe_pickle=True)).info.classes == 7


def test_an_image_size_by_hand_resamples_positions_and_says_so(finetuned: Path) -> None:
    model = load_model(source(finetuned, img_size=96))
    assert model.preprocessing.height == 96
    assert "resampled from 4×4 to 6×6" in model.info.overrides["pos_embed"]


def test_register_tokens_come_from_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    timm = import_timm()
    path = tmp_path / "registers.safetensors"
    save_file(timm.create_model(VIT, num_classes=5, depth=2, reg_tokens=4, no_embed_class=True).state_dict(), path)
    model = load_model(ModelSource(VIT, weights=path, model_args={"depth": 2, "no_embed_class": True}))
    assert model.module.num_prefix_tokens == 5


def test_a_distillation_token_finds_its_architecture(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    timm = import_timm()
    path = tmp_path / "distilled.safetensors"
    save_file(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=2).state_dict(), path)
    model = load_model(ModelSource("deit_tiny_patch16_224", weights=path, model_args={"depth": 2}))
    assert "distilled" in model.info.overrides["architecture"] and model.info.classes == 5


def test_truncated_weights(finetuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(finetuned.read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"cut\.safetensors \(100,000 bytes\) is truncated"):
        load_model(source(path))
    torch = import_torch()
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(ModelError, match=r"cut\.pth .* is truncated or not a file of weights"):
        load_model(source(tmp_path / "cut.pth"))


def test_a_web_page_instead_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ModelError, match="is a web page, expected weights"):
        load_model(source(path))


def test_foreign_weights_name_the_first_keys(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    timm = import_timm()
    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), path)
    with pytest.raises(
        ModelError, match=r"resnet\.safetensors does not fit .*missing: cls_token.*unexpected: \S+, \S+, "
    ) as caught:
        load_model(source(path))
    assert len(str(caught.value)) < 1000


def test_nan_in_weights_names_the_tensor(finetuned: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(finetuned)
    state["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match=r"NaN or infinity in blocks\.1\.mlp\.fc1\.weight"):
        load_model(source(tmp_path / "nan.safetensors"))


def test_no_weights_at_all_names_the_three_ways() -> None:
    with pytest.raises(ModelError, match="--weights FILE, --pretrained, --random-weights; got none"):
        load_model(source())
    with pytest.raises(ModelError, match="more than one"):
        load_model(source(random_weights=True, pretrained=True))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights at .*absent"):
        load_model(source(tmp_path / "absent.pth"))


def test_unknown_model_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="deit_tiny_patch16_224"):
        load_model(source(name="deit_tini_patch16_224", random_weights=True))


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ModelError, match="wings"):
        load_model(ModelSource(VIT, random_weights=True, model_args={"wings": 2}))


def test_class_count_against_the_weights(finetuned: Path) -> None:
    with pytest.raises(ModelError, match="has 7 rows, --num-classes asked for 10"):
        load_model(source(finetuned, num_classes=10))


def test_random_weights_are_seeded() -> None:
    one, two = (load_model(source(random_weights=True)).info.digest for _ in range(2))
    assert one == two != load_model(source(random_weights=True, seed=1)).info.digest


def test_overrides_of_preprocessing_are_recorded(finetuned: Path) -> None:
    model = load_model(source(finetuned, crop_pct=0.5, interpolation="bilinear", mean=(0.1, 0.2, 0.3)))
    assert (model.preprocessing.resize_short, model.preprocessing.interpolation) == (128, "bilinear")
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert {"crop_pct", "interpolation", "mean"} <= set(model.info.overrides)
    with pytest.raises(ModelError, match="interpolation"):
        load_model(source(finetuned, interpolation="cubist"))


@pytest.mark.parametrize(
    ("argument", "value", "option"),
    [("num_classes", 9, "--num-classes"), ("img_size", 96, "--img-size"), ("checkpoint_path", "w.pth", "--weights")],
)
def test_what_an_option_says_is_not_taken_as_an_argument(finetuned: Path, argument: str, value: Any, option: str) -> None:
    """What the weights say won without a word, and the manifest told of the argument all the same."""
    asked = ModelSource(VIT, weights=finetuned, model_args={"depth": 2, argument: value})
    with pytest.raises(ModelError, match=f"got --model-arg {argument}={value} for {VIT}, expected {option}"):
        load_model(asked)


def test_no_classifier_is_drawn_at_random_behind_pretrained_weights() -> None:
    asked = ModelSource(VIT, pretrained=True, num_classes=10)
    with pytest.raises(ModelError, match="tell 1000 classes apart, --num-classes asked for 10: their classifier would be ran"):
        load_model(asked)


def test_a_factory_delivers_a_model() -> None:
    model = load_model(ModelSource(f"{SUPPORT}:tiny_vit", random_weights=True, model_args={"num_classes": 6}))
    assert (model.info.classes, model.preprocessing.height) == (6, 32)
    assert model.labels is None


def test_a_factory_that_does_not_say_how_images_are_prepared() -> None:
    factory = f"{SUPPORT}:bare_vit"
    with pytest.raises(ModelError, match="--img-size, --mean, --std unknown"):
        load_model(ModelSource(factory, random_weights=True))
    given = ModelSource(factory, random_weights=True, img_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert load_model(given).preprocessing.height == 32


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("returns_text", "returned str, expected a torch.nn.Module"),
        (
            "returns_tuple_module",
            r"returned tuple of 0: torch.float32 of shape \(\), 1: torch.float32 of shape \(1, 3, 32, 32\)",
        ),
        ("returns_dict_module", r"returned dict of logits: torch.float32 of shape \(1, 10\), aux: NoneType for one image"),
        ("returns_tokens_module", r"returned torch.float32 of shape \(1, 17, 48\) for one image, expected a \(1, classes\)"),
        ("raises", "raised RuntimeError: the moon is full"),
        ("tini_vit", "did you mean tiny_vit"),
    ],
)
def test_a_factory_returning_nonsense(factory: str, expected: str) -> None:
    with pytest.raises((ModelError, UnknownName), match=expected):
        load_model(ModelSource(f"{SUPPORT}:{factory}", random_weights=True))


def test_a_factory_module_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="no Python module named 'nowhere'"):
        load_model(ModelSource("nowhere:model", random_weights=True))


def test_the_fast_digest_needs_no_torch_and_follows_the_file(finetuned: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = source(finetuned).fast_digest(cache)
    assert first and first == source(finetuned).fast_digest(cache)
    assert source(finetuned, crop_pct=0.5).fast_digest(cache) != first
    assert ModelSource(f"{SUPPORT}:tiny_vit", random_weights=True).fast_digest(cache) is None


def test_a_model_whose_images_are_prepared_otherwise_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import models

    asked, made = ModelSource(f"{SUPPORT}:tiny_vit", random_weights=True), models.tiny_vit

    def brighter() -> Any:
        module = made()
        module.pretrained_cfg = {**module.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
        return module

    first = load_model(asked).info.digest
    assert load_model(asked).info.digest == first
    monkeypatch.setattr(models, "tiny_vit", brighter)
    assert load_model(asked).info.digest != first, "a build of it would be taken from the cache, with the old mean"


@pytest.mark.parametrize("changed", ["activations.py", "parts/scales.py", "net.py"])
def test_a_model_is_another_once_code_that_it_is_made_of_is(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what stands in a file beside the model's: a build would be taken from the cache, with the old activation."""
    from edgevit.model import module_digest

    place = tmp_path / "ownnet"
    (place / "parts").mkdir(parents=True)
    (place / "__init__.py").write_text("")
    (place / "parts" / "__init__.py").write_text("from .scales import SCALE\n")
    (place / "parts" / "scales.py").write_text("SCALE = 2.0\n")
    (place / "activations.py").write_text("import torch\nfrom .parts import SCALE\ndef act(x): return torch.relu(x) * SCALE\n")
    (place / "net.py").write_text(
        "import torch, ownnet.activations\n"
        "class Net(torch.nn.Sequential):\n"
        "    def forward(self, x): return ownnet.activations.act(super().forward(x)).mean((2, 3))\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    made = Net(torch.nn.Conv2d(3, 5, 4, stride=4))\n"
        "    made.pretrained_cfg = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for _ in range(3):
        for name in [n for n in sys.modules if n.split(".")[0] == "ownnet"]:
            monkeypatch.delitem(sys.modules, name)
        model = load_model(ModelSource("ownnet.net:net", random_weights=True))
        found.append((model.info.digest, module_digest(model.module)))
        if len(found) == 2:
            (place / changed).write_text((place / changed).read_text() + "# another\n")
    assert found[0] == found[1], "a build of the same code would be done again"
    assert found[2][0] != found[0][0], "the bundle of the code before would be taken for this one's"
    assert found[2][1] != found[0][1], "the float file of the code before would be taken for this one's"


@pytest.mark.parametrize("change", ["merges", "heads", "buffer"])
def test_modules_of_equal_weights_that_compute_otherwise_differ(change: str) -> None:
    import copy

    from edgevit.compress.merge_tokens import restructure
    from edgevit.model import module_digest

    timm, torch = import_timm(), import_torch()
    plain = timm.create_model(VIT, num_classes=3, img_size=64, depth=2).eval()
    plain.register_buffer("mask", torch.zeros(4), persistent=False)
    one, other = copy.deepcopy(plain), copy.deepcopy(plain)
    if change == "merges":
        one, other = (restructure(m, {"merge": [[0, n]]}) for m, n in ((one, 2), (other, 6)))
    elif change == "heads":
        other.blocks[1].attn.num_heads = 1
    else:
        other.mask[0] = 1.0
    assert module_digest(one) != module_digest(other), "the float file of one would be taken for the other's"
    assert module_digest(one) == module_digest(copy.deepcopy(one))


def test_weights_without_reading_permission_to_run_code_stay_data(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").write_text, ("boom",))

    torch = import_torch()
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {"a": Bomb()}}, path)
    with pytest.raises(ModelError):
        load_model(source(path))
    assert not (tmp_path / "ran").exists()
