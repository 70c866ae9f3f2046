"""The distil step: the original model teaches. After other structural steps it teaches back what they lost, from images without
labels; as the first step it teaches a smaller student.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); Beyer et al. (CVPR 2022) for teaching by function
matching; Touvron et al., DeiT (ICML 2021) for hard labels and the distillation token; Wu et al., TinyViT (ECCV 2022) for kept
sparse logits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from device_agents.wire import StepReport
from edgevit.compress import Compressed, Json, StepContext, TrainingData, step
from edgevit.compress.config import StepConfig
from edgevit.errors import BuildError, DataError

if TYPE_CHECKING:
    import torch

    from edgevit.compress.train import Lesson, Settings, Trained

ASK_BATCH = 50


class StudentConfig(BaseModel):
    """``student:`` of a distil step: what is taught in place of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int | None = Field(default=None, ge=1, description="a copy of so many of the teacher's blocks, evenly spaced")
    model: str | None = Field(default=None, description="a timm model, with random weights")
    args: dict[str, str | int | float | bool] = Field(default={}, description="arguments of the timm model")

    @model_validator(mode="after")
    def _exactly_one(self) -> StudentConfig:
        if (self.depth is None) == (self.model is None):
            raise ValueError("student: give either depth or model")
        if self.depth is not None and self.args:
            raise ValueError("student: args belong to model, not to depth")
        return self


class DistilConfig(StepConfig):
    """``distil:`` of a recipe."""

    minutes: float | None = Field(default=None, gt=0, description="train so long, on whatever machine")
    steps: int | None = Field(default=None, ge=1, description="train so many batches")
    epochs: float | None = Field(default=None, gt=0, description="train so many passes over the images")
    student: StudentConfig | None = Field(default=None, description="a smaller model to teach; without it, the compressed one")
    batch: int = Field(default=32, ge=1, le=4096, description="images a step")
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="AdamW's, at its highest")
    warmup: float = Field(default=0.1, ge=0, le=0.5, description="share of the training over which the learning rate rises")
    logits: float = Field(default=1.0, ge=0, description="weight of the difference of outputs")
    features: float = Field(default=1.0, ge=0, description="weight of the difference of the blocks' outputs")
    label_weight: float = Field(default=0.0, ge=0, description="weight of the cross-entropy with the images' own labels")
    hard: bool = Field(default=False, description="learn the teacher's first choice, not its probabilities")
    temperature: float = Field(default=1.0, gt=0, le=20, description="softens both outputs before they are compared")
    crop: float = Field(default=0.7, gt=0, le=1, description="least share of an image's area that a crop shows")
    flip: bool = Field(default=True, description="mirror half of the images; off where left and right differ")
    mix: float = Field(default=0.2, ge=0, le=1, description="share of images blended with another (mixup, cutmix)")
    balance: bool = Field(default=True, description="draw images of classes that the teacher sees often less often")
    passes: int | None = Field(
        default=None, ge=1, description="ask the teacher over so many passes, keep its largest logits, and repeat these passes"
    )
    top: int = Field(default=100, ge=1, le=10_000, description="with passes: how many logits of an image are kept")
    seed: int = Field(default=0, ge=0, le=2**31, description="of the order and the crops of images")

    @model_validator(mode="after")
    def _sensible(self) -> DistilConfig:
        budgets = [name for name in ("minutes", "steps", "epochs") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise ValueError(f"distil: got {' and '.join(budgets) or 'no budget'}, expected one of minutes, steps, epochs")
        if not (self.logits or self.features or self.label_weight):
            raise ValueError("distil: logits, features and label_weight are all 0, which teaches nothing")
        if self.passes is not None and (self.features or not self.logits):
            raise ValueError("distil: passes keep the teacher's logits alone; set features: 0 and leave logits above 0")
        if self.hard and not self.logits:
            raise ValueError("distil: hard is about logits, whose weight is 0")
        return self

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def uses_images(self) -> bool:
        return False  # it learns from the training images, all of them

    @property
    def needs_labels(self) -> bool:
        return self.label_weight > 0

    @property
    def trains(self) -> bool:
        return True

    def out_of_place(self, before: Sequence[str]) -> str:
        if self.student is not None and before:
            return f"after {', '.join(before)}: a student starts anew, so it comes first"
        if self.student is None and not any(kind in ("prune", "low_rank", "merge_tokens", "distil") for kind in before):
            return "and nothing before it needs recovery: put a prune, low_rank or merge_tokens step first, or name a student"
        return ""


def applies_to(module: torch.nn.Module) -> str:
    """Always "": any classifier can be taught by its outputs."""
    return ""


def restructure(module: torch.nn.Module, plan: Json) -> torch.nn.Module:
    """``module`` as it is (recovery), a copy of some of its blocks, or the timm model of ``plan``."""
    if "kept" in plan:
        return _keep_blocks(module, plan["kept"])
    if "model" in plan:
        return _create(plan)
    return module


def _keep_blocks(module: Any, kept: Sequence[int]) -> torch.nn.Module:
    import torch

    blocks = [module.blocks[i] for i in kept]
    module.blocks = (
        torch.nn.Sequential(*blocks) if isinstance(module.blocks, torch.nn.Sequential) else torch.nn.ModuleList(blocks)
    )
    result: torch.nn.Module = module
    return result


@step(DistilConfig, restructure=restructure)
def distil(state: Compressed, config: DistilConfig, context: StepContext) -> Compressed:
    """Train the module (or a student) from ``state.original``.

    Raises :class:`DataError` without images, or without labels where ``label_weight`` asks for them; :class:`BuildError` for a
    student of other classes, a depth that is none, and a loss that diverges.
    """
    from edgevit.compress.processes import train_anywhere

    context.real_images("distil")
    data = context.training()
    if config.label_weight and data.labels is None:
        raise DataError("distil: label_weight is above 0 and some training images have no labels", hint="label_weight: 0")
    plan = _plan(state, config)
    source = state.module if config.student is None else state.original
    student = restructure(copy.deepcopy(source), plan)
    _verify_classes(student, state)
    settings = make_settings(config, len(data.pixels))
    lesson = _lesson(student, state, config, data, plan, context)
    if config.student is not None and hasattr(student, "set_distilled_training"):
        student.set_distilled_training(True)
    trained = train_anywhere(lesson, settings, context.scratch, context.on_progress)
    if hasattr(student, "set_distilled_training"):
        student.set_distilled_training(False)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    layers = sum(1 for m in student.modules() if next(m.parameters(recurse=False), None) is not None)
    report = StepReport("distil", layers, _summary(config, plan, trained), _details(lesson, trained))
    return state.restructured(student, "distil", plan, report)


def _plan(state: Compressed, config: DistilConfig) -> dict[str, Any]:
    if config.student is None:
        return {}
    if config.student.depth is not None:
        return {"kept": _spread(state.original, config.student.depth)}
    classes = _classes(state.original, state)
    asked = config.student.args.get("num_classes", classes)
    if asked != classes:
        raise _other_classes(asked, classes)
    return {"model": config.student.model, "args": config.student.args, "classes": classes, "seed": config.seed}


def _spread(teacher: Any, depth: int) -> list[int]:
    """Indices of ``depth`` of the teacher's blocks, the first and the last among them."""
    import torch

    blocks = getattr(teacher, "blocks", None)
    if not isinstance(blocks, (torch.nn.Sequential, torch.nn.ModuleList)) or len({type(b) for b in blocks}) != 1:
        raise BuildError(
            f"distil: a shallower copy needs a plain sequence of like blocks, which {type(teacher).__name__} has not",
            hint="student: {model: NAME} teaches a timm model instead",
        )
    if depth >= len(blocks):
        raise BuildError(f"distil: student depth {depth}, expected 1 … {len(blocks) - 1}: the teacher has {len(blocks)} blocks")
    if depth == 1:
        return [len(blocks) - 1]
    return [round(i * (len(blocks) - 1) / (depth - 1)) for i in range(depth)]


def _create(plan: Json) -> torch.nn.Module:
    import torch

    from edgevit.model import ModelSource
    from edgevit.timmsource import build_timm_module

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan["seed"])
        source = ModelSource(plan["model"], random_weights=True, num_classes=plan["classes"], model_args=plan["args"])
        module: torch.nn.Module = build_timm_module(source, None, {})[0]
    return module


def _classes(module: torch.nn.Module, state: Compressed) -> int:
    """How many classes ``module`` tells apart, by running it on one empty image."""
    import torch

    shape = state.preprocessing
    try:
        with torch.no_grad():
            return int(module.eval()(torch.zeros(1, 3, shape.height, shape.width)).shape[-1])
    except (RuntimeError, AssertionError) as e:
        raise BuildError(
            f"distil: {type(module).__name__} does not take the teacher's {shape.height} × {shape.width} images: {e}",
            hint=f"student: args: {{img_size: {shape.height}}}, where the model takes it",
        ) from e


def _verify_classes(student: torch.nn.Module, state: Compressed) -> None:
    taught, known = _classes(student, state), _classes(state.original, state)
    if taught != known:
        raise _other_classes(taught, known)


def _other_classes(student: object, teacher: int) -> BuildError:
    said = f"distil: the student has {student} classes, its teacher {teacher}"
    return BuildError(said, hint="leave num_classes to the teacher")


def make_settings(config: DistilConfig, images: int) -> Settings:
    """The training that ``config`` asks for on ``images`` images. Raises :class:`BuildError` for a budget of no step at all."""
    from edgevit.compress.augment import Augmentation
    from edgevit.compress.train import Settings

    steps = config.steps
    if config.epochs is not None:
        steps = round(config.epochs * images / min(config.batch, images))
        if steps < 1:
            raise BuildError(f"distil: {config.epochs:g} epochs of {images} images are no step of {config.batch} images")
    return Settings(
        steps,
        None if config.minutes is None else 60 * config.minutes,
        min(config.batch, images),
        config.learning_rate,
        config.warmup,
        Augmentation(config.crop, config.flip, config.mix),
        config.seed,
        config.logits,
        config.features,
        config.label_weight,
        config.hard,
        config.temperature,
        config.passes,
        config.top,
    )


def _lesson(
    student: Any, state: Compressed, config: DistilConfig, data: TrainingData, plan: Json, context: StepContext
) -> Lesson:
    import torch

    from edgevit.compress.train import Lesson

    pixels = torch.from_numpy(data.pixels)
    labels = torch.tensor(data.labels) if config.label_weight and data.labels is not None else None
    pairs = _pairs(student, state, plan.get("kept")) if config.features else ()
    weights = class_weights(_first_choices(state, data, context)) if config.balance else None
    if not (pairs or config.logits or config.label_weight):
        raise BuildError(
            f"distil: no block of {type(student).__name__} gives what its teacher's blocks give, and nothing else is compared",
            hint="logits above 0",
        )
    taught = config.logits or config.features
    return Lesson(student, state.original if taught else None, pixels, labels, state.preprocessing, pairs, weights)


def _pairs(student: Any, state: Compressed, kept: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Pairs of block numbers whose outputs can be subtracted, found by running both on one empty image."""
    import torch

    from edgevit.compress.match import Taps, comparable, pair_parts, trunk_parts

    parts = [part for _, part in trunk_parts(student)], [part for _, part in trunk_parts(state.original)]
    wanted = pair_parts(len(parts[0]), len(parts[1]), kept)
    taps = Taps([parts[0][i] for i, _ in wanted]), Taps([parts[1][j] for _, j in wanted])
    shape = state.preprocessing
    try:
        with torch.no_grad():
            for module in (student.eval(), state.original):
                module(torch.zeros(1, 3, shape.height, shape.width))
        prefix = int(getattr(student, "num_prefix_tokens", 0))
        seen = zip(wanted, taps[0].seen, taps[1].seen, strict=True)
        return tuple(pair for pair, own, target in seen if comparable(own, target, prefix) is not None)
    finally:
        for one in taps:
            one.remove()


def _first_choices(state: Compressed, data: TrainingData, context: StepContext) -> torch.Tensor:
    """The class (N,) that the teacher sees in the middle of each training image."""
    import torch

    from edgevit.compress.calibrate import normalise
    from edgevit.compress.hardware import Cpu

    shape = state.preprocessing
    side = data.pixels.shape[1]
    top, left = (side - shape.height) // 2, (side - shape.width) // 2
    middle = data.pixels[:, top : top + shape.height, left : left + shape.width]
    context.on_progress.start("ask", "asking the teacher what the training images show", len(middle), "images")
    found = []
    with torch.no_grad(), Cpu().autocast():
        for start in range(0, len(middle), ASK_BATCH):
            found.append(state.original(normalise(middle[start : start + ASK_BATCH], shape)).argmax(1))
            context.on_progress.advance("ask", min(start + ASK_BATCH, len(middle)))
    classes = torch.cat(found)
    context.on_progress.finish("ask", f"{len(middle):,} training images show {len(classes.unique()):,} classes")
    return classes


def class_weights(classes: torch.Tensor) -> torch.Tensor:
    """How often to draw each image (N,), by its class: one over the root of how many share it, so that a set of few classes
    with many images adds to a set of many classes without drowning it."""
    return classes.bincount()[classes].double().rsqrt()


def _summary(config: DistilConfig, plan: Json, trained: Trained) -> str:
    who = "recovered"
    if "kept" in plan:
        who = f"a copy of {len(plan['kept'])} blocks"
    elif "model" in plan:
        who = str(plan["model"])
    images = trained.images // max(trained.steps, 1)
    return f"{who}: {trained.steps} steps of {images} images in {trained.seconds / 60:.1f} min, teacher: the original"


def _details(lesson: Lesson, trained: Trained) -> dict[str, str]:
    compared = f"{len(lesson.pairs)} block outputs and the logits" if lesson.pairs else "the logits alone"
    passes = trained.images / len(lesson.pixels)
    return {
        "data": f"{len(lesson.pixels):,} images, {passes:.1f} passes: {trained.images:,} images seen",
        "compared": compared if lesson.teacher is not None else "labels alone",
        "loss": f"{trained.first_loss:.4f} at the start, {trained.last_loss:.4f} at the end",
    }
