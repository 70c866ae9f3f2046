"""Does a teacher help? A shallow student of handwritten digits with few labels, taught and untaught.

Every arm starts from the same random weights and makes the same number of steps with the same augmentation. The teacher was
trained on the very same labelled images and on nothing else: a ResNet, since convolutional networks learn more from few images
and are the better teachers of transformers (Touvron et al., DeiT, ICML 2021).

- *labels alone*: the student learns from the labels, without a teacher.
- *taught*: the student learns what the teacher says of the same batches, labels unseen.
- *taught + unlabelled*: it also learns what the teacher says of images without labels. Labels alone cannot use those, which
  is what a teacher is for; but it is the one difference between the arms that is not the teacher.

Held-out top-1 of each seed, then the means. The settings were chosen with another seed, judged by 500 training digits that were
kept from those runs.

    python benchmarks/distil_digits.py [--labelled 100] [--steps 600] [--seeds 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from device_agents.wire import Preprocessing
from edgevit.compress.augment import Augmentation
from edgevit.compress.calibrate import normalise
from edgevit.compress.hardware import Cpu
from edgevit.compress.train import Lesson, Settings, train
from edgevit.digits import HELD_OUT, NORMALISATION, SIZE, digits_vit, load_digits
from edgevit.progress import Quiet
from edgevit.torchsetup import import_timm, import_torch

SHAPE = Preprocessing(SIZE, SIZE, SIZE, "bilinear", "center", **NORMALISATION)
AUGMENTATION = Augmentation(crop=0.7, flip=False, mix=0.2)
ARMS = ("labels alone", "taught", "taught + unlabelled")


def top1(module: Any) -> float:
    """Percent right on the digits that nothing trains on."""
    torch = import_torch()
    pixels, labels = load_digits()
    with torch.no_grad():
        outputs = module(normalise(pixels[-HELD_OUT:], SHAPE))
    return 100 * float((outputs.argmax(1).numpy() == labels[-HELD_OUT:]).mean())


def run(student: Any, teacher: Any, images: int, steps: int, seed: int) -> Any:
    """``student`` after training on the first ``images`` digits: from their labels (``teacher`` None), or from the teacher."""
    torch = import_torch()
    pixels, labels = load_digits()
    weights = {"labels": 1.0, "logits": 0.0} if teacher is None else {"logits": 1.0}
    settings = Settings(steps, None, 25, 1e-3, 0.1, AUGMENTATION, seed, **weights)
    seen = torch.from_numpy(labels[:images]) if teacher is None else None
    lesson = Lesson(student, teacher, torch.from_numpy(pixels[:images]), seen, SHAPE)
    with tempfile.TemporaryDirectory() as scratch:
        train(lesson, settings, Cpu(), Path(scratch), Quiet())
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the student")
    parser.add_argument("--steps", type=int, default=600, help="of every arm")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    torch = import_torch()
    began = time.monotonic()
    whole = len(load_digits()[1]) - HELD_OUT
    print(f"{a.labelled} labelled digits, {whole - a.labelled} without labels; {a.depth} blocks, {a.steps} steps of 25 images")
    print("seed   teacher" + "".join(f"   {name}" for name in ARMS))
    rows = []
    for seed in range(a.seeds):
        torch.manual_seed(seed)
        teacher = run(import_timm().create_model("resnet10t", num_classes=10), None, a.labelled, a.teacher_steps, seed)
        row = [top1(teacher)]
        for who, images in ((None, a.labelled), (teacher, a.labelled), (teacher, whole)):
            torch.manual_seed(1000 + seed)
            row.append(top1(run(digits_vit(depth=a.depth), who, images, a.steps, seed)))
        rows.append(row)
        show(str(seed), row)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    show("mean", means)
    for name, mean in zip(ARMS[1:], means[2:], strict=True):
        print(f"{name}: {mean - means[1]:+.2f} points over labels alone")
    print(f"{time.monotonic() - began:.0f} s")


def show(name: str, row: list[float]) -> None:
    """One line of the table."""
    print(f"{name:>4}   {row[0]:7.2f}" + "".join(f"   {x:{len(a)}.2f}" for a, x in zip(ARMS, row[1:], strict=True)), flush=True)


if __name__ == "__main__":
    main()
