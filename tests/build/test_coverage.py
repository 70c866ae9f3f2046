"""The list of families against timm itself, the runner with processes that crash and hang, and two small families whole."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit.cache import Cache
from edgevit.cli import run_cli
from edgevit.coverage import cells, run
from edgevit.coverage.cells import Row, cover
from edgevit.coverage.families import CONVOLUTIONAL, FAMILIES, NOT_CLASSIFIERS, Family, chosen
from edgevit.coverage.weights import draw_weights, spread
from edgevit.errors import UnknownName
from edgevit.progress import Quiet

SMALL = Family("vit", "test_vit", "transformer", "vision_transformer", 10)
ROOMY = run.Limits(300, 8000)


def test_every_module_of_timm_is_covered_or_left_out_with_a_reason() -> None:
    """A family that a new timm brings fails here until it is named."""
    from edgevit.torchsetup import import_timm

    timm = import_timm()
    from timm.models import list_modules

    known = set(list_modules())
    ours = {f.module for f in FAMILIES}
    assert not ours & set(CONVOLUTIONAL) and not ours & set(NOT_CLASSIFIERS)
    assert known - ours - set(CONVOLUTIONAL) - set(NOT_CLASSIFIERS) == set()
    names = set(timm.list_models())
    assert [f.member for f in FAMILIES if f.member not in names] == []
    assert len({f.name for f in FAMILIES}) == len(FAMILIES) >= 40
    for family in FAMILIES:
        assert family.member in timm.list_models(module=family.module), family


def test_unknown_families_offer_the_nearest() -> None:
    assert [f.name for f in chosen(("swin", "vit"))] == ["vit", "swin"]
    with pytest.raises(UnknownName, match="did you mean"):
        chosen(("swim",))


def test_drawn_weights_let_every_part_of_a_model_speak() -> None:
    """LayerScale of 1e-5 and position biases of zero leave blocks without a say; drawn weights do not."""
    import torch

    from edgevit.torchsetup import import_timm

    timm = import_timm()
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10, init_values=1e-5
    )
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def change_without_first_block(module: Any) -> float:
        with torch.no_grad():
            whole = module(x)
            block, module.blocks[0] = module.blocks[0], torch.nn.Identity()
            module.blocks[0].forward = lambda y, **_: y
            without = module(x)
            module.blocks[0] = block
        return float((whole - without).norm() / whole.norm())

    model.eval()
    assert change_without_first_block(model) < 1e-3
    draw_weights(model, x)
    assert change_without_first_block(model) > 0.05
    with torch.no_grad():
        first = model(x).numpy()
        draw_weights(model, x)
        assert np.array_equal(first, model(x).numpy())
    assert spread(first) > cells.LEAST_SPREAD and spread(np.ones((4, 10))) == 0


def test_two_schemes_of_a_small_transformer(tmp_path: Path) -> None:
    fp32, int8 = cover(SMALL, "onnx", Cache(tmp_path))
    assert fp32.passed and int8.passed, (fp32.reason, int8.reason)
    assert (fp32.integer_layers, int8.scheme) == (0, "int8-dynamic") and int8.integer_layers > 20
    assert int8.bytes < fp32.bytes and 0 < (int8.min_cosine or 0) < (fp32.min_cosine or 0) <= 1


def test_a_model_that_does_not_load_is_a_row(tmp_path: Path) -> None:
    rows = list(cover(Family("ghost", "no_such_model", "transformer", "none"), "onnx", Cache(tmp_path)))
    assert [(r.scheme, r.stage) for r in rows] == [("fp32", "model"), ("int8-dynamic", "model")]
    assert all("no timm model named 'no_such_model'" in r.reason for r in rows)


def _work(piece: run.Piece, link: Any) -> None:
    """Stands in for a family's process: one that passes, dies after its first row, hangs, or eats memory."""
    row = Row(piece.family.name, "transformer", piece.family.member, piece.format, "fp32", min_cosine=1.0)
    link.send(row)
    if piece.family.name == "dies":
        os.kill(os.getpid(), 9)
    if piece.family.name == "hangs":
        time.sleep(600)
    if piece.family.name == "swells":
        held = np.ones(60_000_000)
        time.sleep(600)
        del held
    if piece.family.name == "breaks":
        link.send("KeyError: 'nothing'")
        return
    link.send(Row(piece.family.name, "transformer", piece.family.member, piece.format, "int8-dynamic", min_cosine=0.99))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Processes that run ``_work``, by name as they start."""
    started: list[str] = []
    start = run._start

    def starting(piece: run.Piece) -> Any:
        started.append(piece.name)
        return start(piece)

    monkeypatch.setattr(run, "_work", _work)
    monkeypatch.setattr(run, "_start", starting)
    yield started


def _family(name: str) -> Family:
    return Family(name, "test_vit", "transformer", "vision_transformer")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_crashes_hangs_and_memory_are_named_failures_and_all_is_kept(counted: list[str], tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def done(names: list[str], limits: run.Limits, again: bool = False) -> dict[str, tuple[Row, ...]]:
        found = run.cover_all([_family(n) for n in names], ["onnx"], 2, limits, again, cache, Quiet())
        return {rows[0].family: rows for rows in found}

    rows = done(["fine", "dies", "breaks", "swells"], run.Limits(120, 400))
    assert all(len(one) == 2 and one[0].passed for one in rows.values())
    assert rows["fine"][1].passed
    assert rows["dies"][1].reason == "its process ended: SIGKILL" and rows["dies"][1].stage == "process"
    assert rows["breaks"][1].reason == "KeyError: 'nothing'"
    assert "MB, at most 400 MB are allowed" in rows["swells"][1].reason
    assert done(["hangs"], run.Limits(8, 8000))["hangs"][1].reason == "not done after 8 s"
    before = len(counted)
    assert done(["fine", "dies", "breaks", "swells"], ROOMY) == rows
    assert len(counted) == before, "a second run does nothing"
    done(["fine", "dies"], ROOMY, again=True)
    assert counted[before:] == ["dies onnx"]


def test_the_command_lists_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["coverage", "--list", "--json", "swin", "vit"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f["member"] for f in told["families"]] == ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def test_the_page_is_what_its_data_says() -> None:
    from scripts.coverage_docs import main

    assert main(["--check"]) == 0
