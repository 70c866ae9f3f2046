"""How long the second run of an unchanged study takes, as a whole process, beside the first: nothing is built or measured.

A ViT-Tiny of timm with random weights, four recipes in ONNX, on this machine, with the quick plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from edgevit.torchsetup import import_timm, import_torch

ROUNDS = 5
STUDY = """\
schema: edgevit.study/1
name: again
summary: the second run of an unchanged study
models:
  - name: vit_tiny_patch16_224
    weights: weights.safetensors
recipes: [fp32, fp16, int8-dynamic, int8-weights]
plan: quick
"""


def run(file: Path) -> tuple[float, dict[str, Any]]:
    """(seconds of the whole process, its JSON)."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "edgevit", "study", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began, json.loads(done.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGEVIT_HOME"] = str(Path(scratch) / "home")
        timm, torch = import_timm(), import_torch()
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(Path(scratch) / "weights.safetensors"))
        file = Path(scratch) / "again.yaml"
        file.write_text(STUDY)
        first, said = run(file)
        print(
            f"first run   {first:6.1f} s   {len(said['built'])} cells built, {len(said['measured'].get('local', []))} measured"
        )
        for _ in range(ROUNDS):
            seconds, said = run(file)
            measured = sum(len(names) for names in said["measured"].values())
            note = " (a measurement was INVALID and is taken again)" if measured else ""
            print(f"again       {seconds:6.2f} s   {len(said['built'])} cells built, {measured} measured{note}")


if __name__ == "__main__":
    main()
