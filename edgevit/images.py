"""The images a build looks at: which a recipe cannot do without, calibration, training, parity and golden pixels, and the
evaluation set; decoded once and kept by digest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents import wire
from edgevit.cache import Cache, Entry, digest_of, tool_versions
from edgevit.data import ImageSet, match_labels, open_data, pixels
from edgevit.errors import DataError
from edgevit.model import LoadedModel
from edgevit.profile import Profile
from edgevit.progress import Progress
from edgevit.recipe import Recipe

if TYPE_CHECKING:
    from edgevit.build import BuildRequest
    from edgevit.compress import TrainingData
    from edgevit.compress.walk import StepData

PARITY_IMAGES = 32


@dataclass(frozen=True)
class DataSets:
    """The image sets of one request, listed and not yet decoded; labels are as written."""

    evaluation: ImageSet | None
    calibration: ImageSet | None
    training: tuple[ImageSet, ...]

    @property
    def learned_from(self) -> tuple[ImageSet, ...]:
        """What training steps see: the training sets, else the calibration set."""
        return self.training or (() if self.calibration is None else (self.calibration,))


def open_sets(request: BuildRequest, cache: Cache) -> DataSets:
    """List the images of a request. Raises :class:`DataError` as :func:`edgevit.data.open_data` does."""

    def listed(path: Path | None) -> ImageSet | None:
        return None if path is None else open_data(path, cache)

    training = tuple(open_data(path, cache) for path in request.train_data)
    return DataSets(listed(request.eval_data), listed(request.calib_data), training)


def lacks_data(recipe: Recipe, sets: DataSets) -> tuple[str, str] | None:
    """Which images ``recipe`` cannot do without and was not given, and the hint; None where nothing is missing."""
    for step, config in [(one, config) for one in recipe.steps for config in one.configs]:
        needed = "labelled images" if config.needs_labels else "unlabelled images"
        if (config.needs_images and sets.calibration is None) or (config.trains and not sets.learned_from):
            return f"needs {needed} for its step {step.kind}, and was given no images", "add --calib DATA"
        seen = sets.learned_from if config.trains else (sets.calibration,)
        bare = next((s for s in seen if s is not None and s.labels is None), None)
        if config.needs_labels and bare is not None:
            return (
                f"needs {needed} for its step {step.kind}, and {bare.name} has no labels",
                "add labels, or leave the step out",
            )
    return None


@dataclass(frozen=True)
class BuildImages:
    """What the build looks at: calibration and training images, parity and golden pixels, and the evaluation set."""

    steps: StepData
    parity: Any
    golden: Any
    evaluation: ImageSet | None


def gather_images(request: BuildRequest, model: LoadedModel, cache: Cache, on_progress: Progress) -> BuildImages:
    """Decode what ``request`` names, seeded synthetic images where it names none. Raises :class:`DataError` for evaluation
    images without labels, labels the model does not know, and calibration images that are all alike."""
    from edgevit.compress import CalibrationData
    from edgevit.compress.walk import DAMAGE_IMAGES, StepData
    from edgevit.golden import GoldenImages, choose_golden, synthetic_images

    evaluation = None
    if request.eval_data is not None:
        evaluation = _matched(open_data(request.eval_data, cache), model)
        if evaluation.labels is None:
            raise DataError(
                f"{request.eval_data} has no labels; --eval counts right answers", hint="give it as --calib instead"
            )
    labelled = request.recipe.needs == "labelled images"

    def listed(path: Path, learns: bool) -> ImageSet:
        """Labels count only where a step learns from them: a model may well be calibrated on pictures of other classes."""
        images = open_data(path, cache)
        return _matched(images, model) if learns else replace(images, labels=None, class_names=None)

    calibration_set = None
    if request.calib_data is not None:
        calibration_set = listed(request.calib_data, labelled and not request.train_data)
    train_sets = [listed(path, labelled) for path in request.train_data]
    if not train_sets and calibration_set is not None:
        train_sets = [calibration_set]

    def training() -> TrainingData:
        return _training_data(request, model, train_sets, cache, on_progress)

    multiple, trained_on = width_multiple(request.profiles), digest_of([s.digest for s in train_sets])
    source = calibration_set or evaluation
    if source is None:
        count = len(choose_golden(1, request.batch))
        drawn = synthetic_images(count + PARITY_IMAGES, model.preprocessing)
        none = CalibrationData(drawn[count:], None, real=False)
        data = StepData(none, training, multiple, "synthetic", trained_on)
        return BuildImages(data, drawn[count:], GoldenImages(drawn[:count], "synthetic"), None)
    measured = DAMAGE_IMAGES if len(request.recipe.steps) > 1 else PARITY_IMAGES
    wanted = max(request.recipe.images, measured) if calibration_set else PARITY_IMAGES
    order = _shuffled(len(source))[:wanted]
    golden = choose_golden(len(source), request.batch)
    chosen = _cached_pixels(cache, source, model.preprocessing, order, "calibration images", on_progress)
    if calibration_set is not None:
        verify_different(chosen, str(request.calib_data))
    labels = None if source.labels is None else tuple(source.labels[i] for i in order)
    real = CalibrationData(chosen, labels, real=calibration_set is not None)
    golden_pixels = _cached_pixels(cache, source, model.preprocessing, golden, "golden images", on_progress)
    data = StepData(real, training, multiple, digest_of(source.digest, real.real), trained_on)
    return BuildImages(data, chosen[:PARITY_IMAGES], GoldenImages(golden_pixels, "images"), evaluation)


def _training_data(
    request: BuildRequest, model: LoadedModel, sets: Sequence[ImageSet], cache: Cache, on_progress: Progress
) -> TrainingData:
    """Every image of the training sets, a margin wider than the model's input; labels where every set has them."""
    import numpy as np

    from edgevit.compress import TrainingData

    if not sets:
        raise DataError(f"{request.recipe.name} trains and was given no images", hint="add --train DATA, or --calib DATA")
    side = -(-model.preprocessing.height * 8 // 7)
    wider = replace(model.preprocessing, height=side, width=side, resize_short=side)
    parts = [_cached_pixels(cache, s, wider, list(range(len(s))), "training images", on_progress) for s in sets]
    labels = None
    if all(s.labels is not None for s in sets):
        labels = tuple(label for s in sets for label in s.labels or ())
    return TrainingData(parts[0] if len(parts) == 1 else np.concatenate(parts), labels)


def verify_different(pixels: Any, where: str) -> None:
    """Raises :class:`DataError` where all of ``pixels`` (N, height, width, 3) are one image: it teaches no range."""
    if len(pixels) > 1 and bool((pixels == pixels[:1]).all()):
        raise DataError(
            f"{where}: all {len(pixels)} calibration images are alike", hint="give images such as the model will see"
        )


def width_multiple(profiles: Sequence[Profile]) -> int:
    """What widths must be a multiple of for every one of ``profiles``."""
    return math.lcm(*(p.width_multiple.value for p in profiles))


def _matched(images: ImageSet, model: LoadedModel) -> ImageSet:
    """Labels as indices of the model's classes: by its own names, or ImageNet's synsets where it has 1,000."""
    from edgevit.labels import IMAGENET_CLASSES, imagenet_synsets

    schemes = [] if model.labels is None else [model.labels]
    if model.info.classes == IMAGENET_CLASSES and images.class_names is not None:
        schemes.append(imagenet_synsets())
    return match_labels(images, model.info.classes, schemes, model.info.name)


def _shuffled(count: int) -> list[int]:
    import numpy as np

    return [int(i) for i in np.random.default_rng(0).permutation(count)]


def _cached_pixels(
    cache: Cache, images: ImageSet, preprocessing: wire.Preprocessing, indices: list[int], what: str, on_progress: Progress
) -> Any:
    """The array of :func:`keep_pixels`."""
    import numpy as np

    entry = keep_pixels(cache, images, preprocessing, indices, what, on_progress)
    return np.load(entry.files["images"], allow_pickle=False)


def keep_pixels(
    cache: Cache, images: ImageSet, preprocessing: wire.Preprocessing, indices: list[int], what: str, on_progress: Progress
) -> Entry:
    """The cache's entry of those pixels as one .npy file named ``images``: uint8 (N, height, width, 3), made the first time."""
    from edgevit.golden import npy_bytes

    shape = {k: v for k, v in wire.encode(preprocessing).items() if k != "std"}
    key = digest_of("pixels", images.digest, shape, indices, tool_versions().get("pillow"))
    known = cache.get(key)
    if known is not None:
        return known
    on_progress.start(what, f"preparing {what}", len(indices), "images")
    made = pixels(images, preprocessing, indices, lambda done: on_progress.advance(what, done))
    on_progress.finish(what, f"{len(indices):,} {what}")
    return cache.put(key, {"images": npy_bytes(made)}, {})
