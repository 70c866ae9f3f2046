"""Parity gates: a right file passes, one with a zeroed layer, swapped channels or NaN fails with its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from device_agents.wire import CheckedRuntime
from edgevit.errors import ParityError
from edgevit.export.parity import GATES, cosines, find_turned, measure_parity, reference_outputs, verify_parity
from edgevit.golden import choose_golden, npy_bytes, synthetic_images, tolerance_for
from edgevit.model import LoadedModel, ModelSource, load_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSource("tests.support.models:tiny_vit", random_weights=True))


@pytest.fixture(scope="module")
def images(model: LoadedModel) -> Any:
    return synthetic_images(32, model.preprocessing)


@pytest.fixture(scope="module")
def reference(model: LoadedModel, images: Any) -> Any:
    return reference_outputs(model.module, images, model.preprocessing)


def test_equal_outputs_pass_every_gate(reference: Any) -> None:
    for scheme in GATES:
        assert verify_parity("a", scheme, reference, reference.copy()).top1_agreement == 1.0


@pytest.mark.parametrize("scheme", sorted(GATES))
def test_a_zeroed_layer_fails(model: LoadedModel, images: Any, reference: Any, scheme: str) -> None:
    import copy

    broken = copy.deepcopy(model.module)
    broken.blocks[0].mlp.fc2.weight.data.zero_()
    outputs = reference_outputs(broken, images, model.preprocessing)
    with pytest.raises(ParityError, match="cosine"):
        verify_parity("onnx-x", scheme, reference, outputs)


@pytest.mark.parametrize("scheme", sorted(GATES))
def test_swapped_channels_fail(model: LoadedModel, images: Any, reference: Any, scheme: str) -> None:
    outputs = reference_outputs(model.module, images[..., ::-1], model.preprocessing)
    with pytest.raises(ParityError):
        verify_parity("onnx-x", scheme, reference, outputs)


def test_dead_and_broken_outputs_fail(reference: Any) -> None:
    with pytest.raises(ParityError, match="smallest cosine 0"):
        verify_parity("a", "int8-dynamic", reference, np.zeros_like(reference))
    broken = reference.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ParityError, match="NaN or infinity on 1 images"):
        measure_parity(reference, broken)
    with pytest.raises(ParityError, match="shape"):
        measure_parity(reference, reference[:, :-1])


def test_near_ties_do_not_decide() -> None:
    reference = np.array([[1.0, 0.999, -2.0], [5.0, 0.0, -2.0]], np.float32)
    outputs = np.array([[0.999, 1.0, -2.0], [5.0, 0.0, -2.0]], np.float32)
    assert verify_parity("a", "int8-dynamic", reference, outputs).top1_agreement == 0.5
    outputs[1] = [4.9, 5.0, -2.0]
    with pytest.raises(ParityError, match=r"top-1 agreement 0\.000 over 1 clear images"):
        verify_parity("a", "int8-dynamic", reference, outputs)


def test_a_few_near_ties_between_tokens_do_not_fail_a_float_file_that_merges() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(32, 20)).astype(np.float32)
    reference[:, 4] += 6.0
    outputs = reference.copy()
    outputs[:2] += rng.normal(size=(2, 20)).astype(np.float32) * 0.02
    with pytest.raises(ParityError, match="relative error"):
        verify_parity("a", "fp32", reference, outputs)
    parity = verify_parity("a", "fp32", reference, outputs, merges=True)
    assert parity.max_relative_error > 1e-3, "what is kept is the worst of all images"
    assert "merges other tokens" in find_turned("fp32", parity)[0]
    assert find_turned("fp32", verify_parity("a", "fp32", reference, reference)) == ()

    many = reference + rng.normal(size=reference.shape).astype(np.float32) * 0.02
    with pytest.raises(ParityError, match="relative error"):
        verify_parity("a", "fp32", reference, many, merges=True)
    outputs[0] = -outputs[0]
    with pytest.raises(ParityError, match="near ties"):
        verify_parity("a", "fp32", reference, outputs, merges=True)


def test_cosine_of_a_dead_row_is_zero() -> None:
    assert cosines(np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32))[0] == 0


def test_golden_choice_is_seeded_and_a_multiple_of_the_batch() -> None:
    assert choose_golden(650, 1) == choose_golden(650, 1)
    assert len(set(choose_golden(650, 1))) == 16
    assert len(choose_golden(650, 6)) == 18 and len(choose_golden(5, 1)) == 16


def test_synthetic_images_are_seeded_and_unlike_one_another(images: Any, model: LoadedModel) -> None:
    np.testing.assert_array_equal(images, synthetic_images(32, model.preprocessing))
    assert all(np.abs(images[i].astype(int) - images[i + 1]).mean() > 10 for i in range(31))
    assert images.std() > 30


def test_tolerances_per_scheme() -> None:
    outputs = np.array([[4.0, -2.0, 1.0]], np.float32)
    fp32, _ = tolerance_for("fp32", outputs, ())
    assert (fp32.max_relative, fp32.top1_margin) == (1e-3, pytest.approx(0.008))
    assert tolerance_for("fp16", outputs, ())[0].max_relative == 1e-2
    int8, note = tolerance_for("int8-static", outputs, ())
    assert int8.max_relative is None and int8.min_cosine == 0.98 and int8.top1_margin == pytest.approx(0.4)
    assert "0.1 of the largest output" in note
    ran = CheckedRuntime("onnxruntime", "1.19.2", "3.8.18", 0.5, 0.999)
    wider, note = tolerance_for("int8-static", outputs, (ran,))
    assert wider.top1_margin == pytest.approx(1.0) and "onnxruntime 1.19.2" in note


def test_npy_bytes_are_deterministic_and_hold_no_pickle() -> None:
    import io

    array = np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::-1]
    assert npy_bytes(array) == npy_bytes(array.copy())
    np.testing.assert_array_equal(np.load(io.BytesIO(npy_bytes(array)), allow_pickle=False), array)
