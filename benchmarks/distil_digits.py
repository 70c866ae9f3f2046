"""Does a teacher help? A shallow student of handwritten digits with few labels, taught and untaught.

Both arms start from the same random weights and see the same batches (images, crops, mixtures) for the same number of steps;
one learns from labels alone, the other from a deeper teacher that was trained on the very same labelled images. Held-out top-1
of each seed, then the means.

    python benchmarks/distil_digits.py [--labelled 200] [--steps 400] [--seeds 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from device_agents.wire import Preprocessing
from edgevit.compress.augment import Augmentation
from edgevit.compress.calibrate import normalise
from edgevit.compress.hardware import Cpu
from edgevit.compress.train import Lesson, Settings, train
from edgevit.digits import HELD_OUT, NORMALISATION, SIZE, digits_vit, load_digits
from edgevit.progress import Quiet
from edgevit.torchsetup import import_torch

SHAPE = Preprocessing(SIZE, SIZE, SIZE, "bilinear", "center", **NORMALISATION)
AUGMENTATION = Augmentation(crop=0.7, flip=False, mix=0.7)


def top1(module: Any) -> float:
    """Percent right on the digits that nothing trains on."""
    torch = import_torch()
    pixels, labels = load_digits()
    with torch.no_grad():
        outputs = module(normalise(pixels[-HELD_OUT:], SHAPE))
    return 100 * float((outputs.argmax(1).numpy() == labels[-HELD_OUT:]).mean())


def run(student: Any, teacher: Any, labelled: int, steps: int, seed: int) -> Any:
    """``student`` after training from labels alone (``teacher`` None), or from the teacher on the same batches."""
    torch = import_torch()
    pixels, labels = load_digits()
    chosen = torch.from_numpy(pixels[:labelled]), torch.from_numpy(labels[:labelled])
    taught = teacher is not None
    settings = Settings(
        steps, None, 50, 1e-3, 0.1, AUGMENTATION, seed, logits=1.0 if taught else 0.0, labels=0.0 if taught else 1.0
    )
    lesson = Lesson(student, teacher, *chosen, SHAPE)
    with tempfile.TemporaryDirectory() as scratch:
        train(lesson, settings, Cpu(), Path(scratch), Quiet())
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=int, default=200)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the student; the teacher has 6")
    parser.add_argument("--steps", type=int, default=400, help="of each arm; the teacher trains twice as long")
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    torch = import_torch()
    rows = []
    print("seed   teacher   labels alone   taught")
    for seed in range(a.seeds):
        torch.manual_seed(seed)
        teacher = run(digits_vit(), None, a.labelled, 2 * a.steps, seed)
        arms = []
        for who in (None, teacher):
            torch.manual_seed(1000 + seed)
            arms.append(top1(run(digits_vit(depth=a.depth), who, a.labelled, a.steps, seed)))
        rows.append((top1(teacher), *arms))
        print(f"{seed:4}   {rows[-1][0]:7.2f}   {rows[-1][1]:12.2f}   {rows[-1][2]:6.2f}", flush=True)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print(f"mean   {means[0]:7.2f}   {means[1]:12.2f}   {means[2]:6.2f}   the teacher adds {means[2] - means[1]:+.2f} points")


if __name__ == "__main__":
    main()
