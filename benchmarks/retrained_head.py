"""What a re-trained head costs: deit_tiny is built twice, the second time with another head, and both go to one empty device.

The head of 300 classes is one contiguous tensor, 1 % of the weights. Weights are random, the files are real:
exported, quantized and signed as in any build. Counted is every byte of blobs that the device took in for the second
bundle (the chunk index, golden outputs and all), against the bytes of its blobs.

    python benchmarks/retrained_head.py [--recipe fp32] [--recipe int8-dynamic] [--format onnx] [--format tflite] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GOAL = 0.03
MODEL, CLASSES = "deit_tiny_patch16_224", 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--format", action="append", choices=("onnx", "tflite"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgevit-retrained-") as folder:
        os.environ["EDGEVIT_HOME"] = str(Path(folder) / "home")
        first, second = make_weights(Path(folder))
        rows = []
        for form in given.format or ["onnx", "tflite"]:
            for recipe in given.recipe or ["fp32", "int8-dynamic"]:
                rows.append(measure(Path(folder), f"{recipe}-{form}", recipe, form, first, second))
                print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["share"] <= GOAL for row in rows) else 1


def make_weights(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints that differ in the head alone."""
    import torch
    from safetensors.torch import save_file

    from edgevit.torchsetup import import_timm

    torch.manual_seed(1)
    model = import_timm().create_model(MODEL, num_classes=CLASSES)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    paths = folder / "first.safetensors", folder / "second.safetensors"
    for path in paths:
        # The bias too, as in any trained head: a bias of zeros is left out of a TFLite file, and moves everything in it.
        for name in ("head.weight", "head.bias"):
            torch.nn.init.normal_(weights[name], std=0.02)
        save_file(weights, path)
    return paths


def measure(folder: Path, name: str, recipe: str, form: str, first: Path, second: Path) -> dict[str, object]:
    from edgevit import signing
    from edgevit.bundle import open_bundle
    from edgevit.cli.key import principal
    from edgevit.fleet.agent import Agent
    from edgevit.transport.local import LocalTransport

    bundles = [open_bundle(build(folder / name / w.stem, recipe, form, w), None) for w in (first, second)]
    agent = Agent(LocalTransport(), sys.executable, str(folder / name / "root"))
    agent.allow([signing.allowed_signers_line(principal(), signing.public_line(signing.default_key_path()))])
    whole = agent.install(bundles[0]).received_bytes
    told = agent.have(bundles[1].manifest.blobs(), bundles[1].read_chunk_index())
    sent = agent.install(bundles[1]).received_bytes
    total = sum(blob.size for blob in bundles[1].manifest.blobs())
    head = (CLASSES * 192 + CLASSES) * (4 if recipe == "fp32" else 1)
    return {
        "bundle": name,
        "bytes": total,
        "head_share": round(head / total, 4),
        "index_bytes": bundles[1].manifest.chunks.size,
        "first_sent": whole,
        "second_sent": sent,
        "share": round(sent / total, 4),
        "planned": sum(b.size for b in bundles[1].manifest.blobs() if b.sha256 in told.missing) - sum(told.partial.values()),
    }


def build(out: Path, recipe: str, form: str, weights: Path) -> Path:
    argv = [sys.executable, "-m", "edgevit", "build", MODEL, "--weights", str(weights), "--num-classes", str(CLASSES)]
    argv += ["--recipe", recipe, "--format", form, "--profile", "generic-x86-64", "-o", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return out


if __name__ == "__main__":
    sys.exit(main())
