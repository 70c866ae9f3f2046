"""Distillation: what it learns, what it refuses, and that an interruption of any kind costs nothing but time."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from device_agents.wire import Preprocessing
from edgevit.compress import CalibrationData, Compressed, StepContext, TrainingData, apply_step, restructure
from edgevit.compress.checkpoint import NAME
from edgevit.compress.distil import DistilConfig, class_weights
from edgevit.compress.train import scheduled_rate
from edgevit.errors import BuildError, DataError
from edgevit.progress import Quiet
from edgevit.recipe import Recipe
from edgevit.torchsetup import import_timm, import_torch
from tests.support.models import MEAN, STD, tiny_vit
from tests.support.waiting import wait_for

SHAPE = Preprocessing(32, 32, 32, "bicubic", "center", MEAN, STD)
QUICK = {"batch": 8, "steps": 6, "balance": False}


class Told(Quiet):
    """Keeps what was said, and sends SIGINT to this process at the step that ``interrupt_at`` says."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.said: list[str] = []
        self.interrupt_at = interrupt_at

    def advance(self, key: str, done: float, text: str = "") -> None:
        if key == "distil" and done == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    def finish(self, key: str, text: str = "") -> None:
        self.said.append(text)


def images(count: int = 24) -> Any:
    """Seeded smooth images a margin wider than the model."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, 8, 8, 1), dtype=np.uint8))[:, :37, :37]


def damaged() -> Compressed:
    """A model and what a clumsy compression left of it."""
    torch = import_torch()
    original = tiny_vit().eval()
    module = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.std())
    return Compressed(module, SHAPE, original)


def context(scratch: Path, told: Quiet | None = None, labels: tuple[int, ...] | None = None) -> StepContext:
    pixels = images()
    calibration = CalibrationData(pixels[:16, :32, :32], None, real=True)
    return StepContext(calibration, lambda: TrainingData(pixels, labels), 8, scratch, told or Quiet())


def weights(state: Compressed) -> dict[str, Any]:
    return dict(state.module.state_dict())


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    torch = import_torch()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(state: Compressed) -> float:
    """Mean squared difference of logits from the original's, on the middle of the images."""
    torch = import_torch()
    from edgevit.compress.calibrate import normalise

    x = normalise(images()[:, 2:34, 2:34], SHAPE)
    with torch.no_grad():
        return float((state.module(x) - state.original(x)).pow(2).mean())


def test_recovery_without_labels_brings_the_outputs_nearer_to_the_originals(tmp_path: Path) -> None:
    before = damaged()
    untouched = copy.deepcopy(before.original.state_dict())
    after = apply_step(before, DistilConfig(steps=40, batch=8, learning_rate=1e-3), context(tmp_path))
    assert distance(after) < 0.5 * distance(before)
    assert equal(untouched, dict(before.original.state_dict()))
    assert not any(p.requires_grad for p in after.module.parameters())
    assert not after.module.training
    report = after.reports[-1]
    assert report.details["compared"] == "2 block outputs and the logits"
    assert "24 images" in report.details["data"]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_blocks_that_merge_tokens_are_compared_as_well(tmp_path: Path, pool: str) -> None:
    """By the tokens that never merge, or the mean where there are none: only blocks before the first merge were."""
    from edgevit.compress.merge_tokens import MergeTokensConfig

    original = tiny_vit(depth=3, global_pool=pool).eval()
    whole = Compressed(original, SHAPE, original)
    merged = apply_step(whole, MergeTokensConfig(merge={1: 4}), context(tmp_path))
    after = apply_step(merged, DistilConfig(**QUICK), context(tmp_path))
    assert after.reports[-1].details["compared"] == "3 block outputs and the logits"
    assert not equal(weights(merged), weights(after))


def test_an_interrupted_training_ends_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    config = DistilConfig(**QUICK)
    straight = apply_step(damaged(), config, context(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        apply_step(damaged(), config, context(tmp_path / "b", Told(interrupt_at=3)))
    told = Told()
    resumed = apply_step(damaged(), config, context(tmp_path / "b", told))
    assert any("goes on from step 3" in text for text in told.said)
    assert equal(weights(straight), weights(resumed))


KILLED = """
    import sys, time
    from pathlib import Path
    from edgevit.compress import apply_step, train
    from edgevit.compress.distil import DistilConfig
    from edgevit.progress import Quiet
    from tests.unit.test_distil import QUICK, context, damaged

    train.SAVE_EVERY_S = 0.0

    class Slow(Quiet):
        def advance(self, key, done, text=""):
            if key == "distil" and done > 2:
                time.sleep(60)

    apply_step(damaged(), DistilConfig(**QUICK), context(Path(sys.argv[1]), Slow()))
"""


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=root)
    try:
        wait_for(lambda: (tmp_path / NAME).exists() or process.poll() is not None, "a checkpoint", 120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    told = Told()
    resumed = apply_step(damaged(), DistilConfig(**QUICK), context(tmp_path, told))
    assert any("goes on from step" in text for text in told.said)
    straight = apply_step(damaged(), DistilConfig(**QUICK), context(tmp_path / "other"))
    assert equal(weights(straight), weights(resumed))


TWO = """
    import pickle, sys
    from pathlib import Path
    import torch
    from edgevit.compress import apply_step
    from edgevit.compress.distil import DistilConfig, make_settings
    from edgevit.compress.merge_tokens import MergeTokensConfig
    from edgevit.compress.processes import collect, train_in_processes
    from edgevit.compress.train import Lesson
    from tests.unit.test_distil import QUICK, SHAPE, Told, context, damaged, images

    def main():
        torch.set_num_threads(2)
        torch.randn(512, 512) @ torch.randn(512, 512)
        place, told = Path(sys.argv[1]), Told()
        state = apply_step(damaged(), MergeTokensConfig(merge={1: 1}), context(place))
        before = state.module.head.weight.clone()
        lesson = Lesson(state.module, state.original, torch.from_numpy(images()), None, SHAPE, ((0, 0),))
        settings = make_settings(DistilConfig(**QUICK), 24)
        train_in_processes(pickle.dumps((lesson, settings, place)), 2, told, cpu=True)
        trained = collect(lesson, settings, place)
        print(trained.steps, trained.last_loss < trained.first_loss, torch.equal(before, state.module.head.weight))
        print([text for text in told.said if "6 steps in" in text][0].split(":")[0])

    if __name__ == "__main__":
        main()
"""


def test_two_processes_train_one_model_of_a_parent_with_several_threads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "two.py"  # processes that start afresh read their parent's script again
    script.write_text(textwrap.dedent(TWO))
    several = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=300, env=several
    )
    assert done.stdout.split() == ["6", "True", "False", "process", "1", "of", "2"], done.stderr


def test_a_process_that_fails_ends_the_others_and_is_named(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch = import_torch()
    from edgevit.compress.distil import make_settings
    from edgevit.compress.processes import train_in_processes
    from edgevit.compress.train import Lesson

    state = damaged()
    with torch.no_grad():
        state.original.get_parameter("head.weight").fill_(float("nan"))
    lesson = Lesson(state.module, state.original, torch.from_numpy(images()), None, SHAPE)
    work = pickle.dumps((lesson, make_settings(DistilConfig(**QUICK), 24), tmp_path))
    with pytest.raises(BuildError, match=r"process [12] of 2: distil: the loss was nan at step 1"):
        train_in_processes(work, 2, Quiet(), cpu=True)


def test_a_model_that_cannot_be_sent_trains_on_one_gpu_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from edgevit.compress import processes
    from edgevit.compress.hardware import Cpu

    monkeypatch.setattr(processes, "gpu_count", lambda: 2)
    monkeypatch.setattr(processes, "find_hardware", Cpu)
    state, told = damaged(), Told()
    state.original.register_forward_hook(lambda layer, args, output: None)
    apply_step(state, DistilConfig(**QUICK), context(tmp_path, told))
    assert any(text.startswith("2 GPUs, one is used: the model cannot be sent") for text in told.said)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64])
def test_a_damaged_checkpoint_is_named_and_left_behind(tmp_path: Path, content: bytes) -> None:
    config = DistilConfig(**{**QUICK, "steps": 2})
    straight = apply_step(damaged(), config, context(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / NAME).write_bytes(content)
    told = Told()
    anew = apply_step(damaged(), config, context(tmp_path / "b", told))
    assert any(f"{NAME} is damaged" in text and "anew" in text for text in told.said)
    assert equal(weights(straight), weights(anew))


def test_a_checkpoint_cut_short_by_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = import_torch()
    from edgevit.compress.checkpoint import Position, load_checkpoint, save_checkpoint

    save_checkpoint(tmp_path, {"a": torch.ones(3)}, Position(1, 2.0))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BuildError, match=r"training\.safetensors: No space left on device") as caught:
            save_checkpoint(tmp_path, {"a": torch.zeros(3)}, Position(9, 9.0))
    assert str(tmp_path) in caught.value.hint
    assert "goes on from its last checkpoint" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [NAME], "what was half-written is gone"
    found = load_checkpoint(tmp_path, Quiet())
    assert found is not None
    assert found[1] == Position(1, 2.0)
    assert torch.equal(found[0]["a"], torch.ones(3))


def test_a_time_budget_ends_and_counts_the_time_before_an_interruption(tmp_path: Path) -> None:
    config = DistilConfig(minutes=0.01, batch=8, balance=False)
    with pytest.raises(KeyboardInterrupt):
        apply_step(damaged(), config, context(tmp_path, _InterruptFirst()))
    told = Told()
    after = apply_step(damaged(), config, context(tmp_path, told))
    assert any("goes on from step 1" in text for text in told.said)
    assert "recovered" in after.reports[-1].summary


class _InterruptFirst(Quiet):
    def advance(self, key: str, done: float, text: str = "") -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_shallower_copy_keeps_the_ends_and_comes_back_from_its_plan(tmp_path: Path) -> None:
    original = tiny_vit(depth=4).eval()
    config = DistilConfig(**QUICK, student={"depth": 2}, learning_rate=1e-9)
    after = apply_step(Compressed(original, SHAPE, original), config, context(tmp_path))
    torch = import_torch()
    assert after.structure[-1].plan == {"kept": [0, 3]}
    for mine, theirs in ((0, 0), (1, 3)):
        assert torch.allclose(after.module.blocks[mine].mlp.fc1.weight, original.blocks[theirs].mlp.fc1.weight, atol=1e-5)
    again = restructure(copy.deepcopy(original), after.structure)
    again.load_state_dict(after.module.state_dict(), strict=True)
    assert len(original.blocks) == 4


def test_a_timm_student_learns_both_tokens_and_comes_back_from_its_plan(tmp_path: Path) -> None:
    import_timm()
    torch = import_torch()
    student = {
        "model": "deit_tiny_distilled_patch16_224",
        "args": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48},
    }
    config = DistilConfig(**QUICK, student=student, features=0, label_weight=1.0, hard=True)
    state = Compressed(tiny_vit().eval(), SHAPE, tiny_vit().eval())
    after = apply_step(state, config, context(tmp_path, labels=tuple(i % 10 for i in range(24))))
    fresh: Any = restructure(copy.deepcopy(state.original), after.structure)
    module: Any = after.module
    for name in ("head", "head_dist"):
        assert not torch.equal(getattr(fresh, name).weight, getattr(module, name).weight)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_kept_logits_ask_the_teacher_once_a_batch(tmp_path: Path) -> None:
    state = damaged()
    asked: list[int] = []
    state.original.register_forward_hook(lambda layer, args, output: asked.append(len(output)))
    apply_step(state, DistilConfig(**{**QUICK, "steps": 9}, features=0, passes=1), context(tmp_path))
    assert asked.count(8) == 3


def test_a_disk_too_full_for_kept_logits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BuildError, match=r"could not be written to .*teacher/0-0-0\.safetensors: No space left") as caught:
        apply_step(damaged(), DistilConfig(**QUICK, features=0, passes=1), context(tmp_path))
    assert "make room on the disk" in caught.value.hint


def test_kept_logits_of_all_classes_say_what_the_teacher_said() -> None:
    torch = import_torch()
    from edgevit.compress.match import soft_loss, sparsify

    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sparsify(logits, 10, 2.0).log_probabilities(10), (logits / 2).log_softmax(1), atol=2e-3)
    some = sparsify(logits, 3, 1.0).log_probabilities(10)
    assert torch.allclose(some.exp().sum(1), torch.ones(4), atol=2e-3)
    assert float(soft_loss(logits, logits.log_softmax(1), 1.0)) == pytest.approx(0, abs=1e-6)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    state = damaged()
    seven = {"model": "vit_tiny_patch16_224", "args": {"img_size": 32, "patch_size": 8, "num_classes": 7}}
    with pytest.raises(BuildError, match="student has 7 classes, its teacher 10"):
        apply_step(state, DistilConfig(steps=1, student=seven), context(tmp_path))
    other = Compressed(tiny_vit(num_classes=7).eval(), SHAPE, state.original)
    with pytest.raises(BuildError, match="student has 7 classes, its teacher 10"):
        apply_step(other, DistilConfig(steps=1), context(tmp_path))


def test_a_student_for_other_images_is_refused(tmp_path: Path) -> None:
    student = {"model": "vit_tiny_patch16_224", "args": {"img_size": 64, "depth": 1}}
    with pytest.raises(BuildError, match=r"does not take the teacher's 32 × 32 images"):
        apply_step(damaged(), DistilConfig(steps=1, student=student), context(tmp_path))


def test_blocks_that_cannot_be_compared_teach_nothing(tmp_path: Path) -> None:
    student = {"model": "vit_tiny_patch16_224", "args": {"img_size": 32, "depth": 1}}
    with pytest.raises(BuildError, match="no block of VisionTransformer gives what"):
        apply_step(damaged(), DistilConfig(steps=1, logits=0, student=student), context(tmp_path))


def test_a_depth_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"depth 2, expected 1 … 1"):
        apply_step(damaged(), DistilConfig(steps=1, student={"depth": 2}), context(tmp_path))


def test_missing_labels_and_missing_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        apply_step(damaged(), DistilConfig(steps=1, label_weight=0.5), context(tmp_path))
    synthetic = StepContext(
        CalibrationData(images()[:16, :32, :32], None, real=False), context(tmp_path).training, 8, tmp_path, Quiet()
    )
    with pytest.raises(DataError, match="real images"):
        apply_step(damaged(), DistilConfig(steps=1), synthetic)


def test_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    torch = import_torch()
    state = damaged()
    with torch.no_grad():
        state.original.get_parameter("head.weight").fill_(float("nan"))
    with pytest.raises(BuildError, match="the loss was nan at step 1"):
        apply_step(state, DistilConfig(**QUICK), context(tmp_path))
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({}, "no budget"),
        ({"steps": 3, "minutes": 1}, "minutes and steps"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"minutes": 0}, "greater than 0"),
        ({"steps": 3, "logits": 0, "features": 0}, "teaches nothing"),
        ({"steps": 3, "passes": 2}, "features: 0"),
        ({"steps": 3, "student": {}}, "either depth or model"),
        ({"steps": 3, "student": {"depth": 2, "model": "vit_tiny_patch16_224"}}, "either depth or model"),
    ],
)
def test_senseless_settings_are_refused(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DistilConfig(**settings_)


def test_epochs_of_no_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no step"):
        apply_step(damaged(), DistilConfig(epochs=0.01, batch=24), context(tmp_path))


def recipe(*steps: dict[str, Any]) -> Recipe:
    written = {"schema": "edgevit.recipe/1", "name": "mine", "summary": "for a test", "steps": [*steps, FLOAT]}
    return Recipe.model_validate(written)


FLOAT = {"quantize": {"scheme": "fp32"}}
MERGE = {"merge_tokens": {"r": 1}}


def test_what_a_recipe_with_distil_needs() -> None:
    assert recipe(MERGE, {"distil": {"steps": 3}}).needs == "unlabelled images"
    assert recipe({"distil": {"steps": 3, "student": {"depth": 1}, "label_weight": 0.5}}).needs == "labelled images"
    assert recipe(MERGE, {"distil": {"steps": 3}}).trains


def test_senseless_orders_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing before it needs recovery"):
        recipe({"distil": {"steps": 3}})
    with pytest.raises(ValidationError, match="so it comes first"):
        recipe(MERGE, {"distil": {"steps": 3, "student": {"depth": 1}}})


@given(st.floats(0, 1), st.floats(0, 0.5))
def test_the_learning_rate_never_leaves_its_range_and_ends_at_nothing(progress: float, warmup: float) -> None:
    assert 0 <= scheduled_rate(progress, 3e-4, warmup) <= 3e-4
    assert scheduled_rate(1.0, 3e-4, warmup) == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 1), st.booleans(), st.floats(0, 1), st.integers(0, 10_000))
def test_batches_repeat_and_stay_within_the_images_range(crop: float, flip: bool, mix: float, seed: int) -> None:
    torch = import_torch()
    from edgevit.compress.augment import Augmentation, draw_batch

    pixels = torch.from_numpy(images(4))
    rows = torch.tensor([2, 0, 3])
    how = Augmentation(crop, flip, mix)
    one, two = (draw_batch(pixels, rows, SHAPE, how, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert one.images.shape == (3, 3, 32, 32)
    assert bool(((one.shares >= 0) & (one.shares <= 1)).all())
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    brightness = one.images * std + mean
    assert float(brightness.min()) > -1e-4
    assert float(brightness.max()) < 1 + 1e-4


def test_a_batch_of_whole_unmixed_images_is_the_images() -> None:
    torch = import_torch()
    from edgevit.compress.augment import Augmentation, draw_batch
    from edgevit.compress.calibrate import normalise

    pixels = images(4)[:, :32, :32]
    batch = draw_batch(torch.from_numpy(pixels), torch.arange(4), SHAPE, Augmentation(1.0, False, 0.0), torch.Generator())
    # A whole image is seen uncropped only in the area's middle aspect; the crop of least stretch is the image itself.
    assert batch.images.shape == (4, 3, 32, 32)
    assert torch.equal(batch.shares, torch.ones(4))
    assert float((batch.images.mean((2, 3)) - normalise(pixels, SHAPE).mean((2, 3))).abs().max()) < 0.5


def test_many_images_of_one_class_are_drawn_less_often() -> None:
    torch = import_torch()
    drawn = class_weights(torch.tensor([0, 0, 0, 0, 1]))
    assert drawn.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 1.0])


def test_of_fewer_images_than_a_batch_what_was_seen_is_told() -> None:
    from edgevit.compress.checkpoint import Position
    from edgevit.compress.distil import DistilConfig, make_settings
    from edgevit.compress.train import summed_up

    settings = make_settings(DistilConfig(steps=100, batch=32), 10)
    assert summed_up(settings, Position(100, 1.0), [1.0] * 100, 0).images == 1000, "100 steps of all ten images"
