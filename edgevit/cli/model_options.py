"""The options that say which model, which recipes, which boards and which data: shared by the commands that build."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgevit.cli.console import FloatRange
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from edgevit.build import BuildRequest
    from edgevit.model import ModelSource
    from edgevit.profile import Profile
    from edgevit.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def engine_options(command: F) -> F:
    """Who builds, and how many at a time: ``jobs`` and ``engine_name``."""
    command = click.option(
        "--engine",
        "engine_name",
        type=click.Choice(["processes", "ray"]),
        default="processes",
        show_default=True,
        help="Who builds: processes here, or the Ray cluster of RAY_ADDRESS.",
    )(command)
    return click.option(
        "--jobs", type=click.IntRange(1, 256), help="Processes that build at a time; default: half of the cores."
    )(command)


def _triple(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float, float] | None:
    if value is None:
        return None
    try:
        parts = [float(v) for v in value.replace(",", " ").split()]
    except ValueError as e:
        raise click.BadParameter(f"got {value!r}, expected three numbers such as 0.5,0.5,0.5", param=param) from e
    if len(parts) == 1:
        parts *= 3
    if len(parts) != 3:
        raise click.BadParameter(f"got {len(parts)} numbers, expected three (red, green, blue)", param=param)
    return parts[0], parts[1], parts[2]


def _model_args(_ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in value:
        key, sign, text = item.partition("=")
        if not sign or not key.isidentifier():
            raise click.BadParameter(f"got {item!r}, expected NAME=VALUE", param=param)
        try:
            out[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            out[key] = text
    return out


_MODEL_OPTIONS: list[Callable[[F], F]] = [
    click.option("--pretrained", is_flag=True, help="Weights from the hub, through timm (needs a network)."),
    click.option("--weights", type=FILE, help="safetensors, or .pth / .pth.tar read without unpickling code."),
    click.option("--random-weights", is_flag=True, help="Seeded random weights: for latency only; accuracy means nothing."),
    click.option("--num-classes", type=click.IntRange(min=1), help="Classes, where the weights do not say."),
    click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        callback=_model_args,
        metavar="K=V",
        help="Passed to the model's constructor.",
    ),
    click.option("--labels", type=FILE, help="Class names: one a line, or JSON."),
    click.option(
        "--unsafe-pickle", is_flag=True, help="Allow a checkpoint that runs code while loading. Only for files you trust."
    ),
    click.option("--img-size", type=click.IntRange(min=8), help="Pixels a side; default: what the weights were made for."),
    click.option("--crop-pct", type=FloatRange(0.1, 1.0), help="Crop ÷ resized short side."),
    click.option("--interpolation", help="bicubic, bilinear, nearest, lanczos …"),
    click.option("--mean", callback=_triple, metavar="R,G,B", help="Normalisation mean on the [0, 1] scale."),
    click.option("--std", callback=_triple, metavar="R,G,B", help="Normalisation standard deviation on the [0, 1] scale."),
]

_RECIPE_OPTION: Callable[[F], F] = click.option(
    "--recipe",
    "recipes",
    multiple=True,
    required=True,
    metavar="R",
    help="A shipped recipe or a YAML file; several allowed.",
)

_DATA_OPTIONS: list[Callable[[F], F]] = [
    click.option(
        "--format",
        "model_formats",
        type=click.Choice(["onnx", "tflite", "ort", "all"]),
        multiple=True,
        default=("all",),
        callback=lambda _context, _option, chosen: chosen_formats(chosen),
        help="What to write; several allowed. all (the default): onnx and tflite; ort: ONNX Runtime's own, for reduced builds.",
    ),
    click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="Images per inference."),
    click.option(
        "--eval", "eval_data", type=FILE, metavar="DATA", help="Labelled images; their top-1 is counted on the device."
    ),
    click.option("--calib", "calib_data", type=FILE, metavar="DATA", help="Unlabelled images for calibration and parity."),
    click.option(
        "--train",
        "train_data",
        type=FILE,
        multiple=True,
        metavar="DATA",
        help="Images that training steps learn from; several allowed. Default: --calib.",
    ),
    click.option("--sign-key", type=FILE, help="SSH private key that signs; default: the one of `edgevit key`."),
]


def model_options(command: F) -> F:
    """MODEL and everything that says where it comes from."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return click.argument("model")(command)


def build_options(command: F) -> F:
    """Recipes, and what :func:`data_options` has."""
    return _RECIPE_OPTION(data_options(command))


def data_options(command: F) -> F:
    """Formats, data and the signing key."""
    for option in reversed(_DATA_OPTIONS):
        command = option(command)
    return command


def model_source(options: dict[str, Any]) -> ModelSource:
    """The click values of :func:`model_options` → a ModelSource; takes them out of ``options``."""
    from edgevit.model import ModelSource

    names = [
        *("pretrained", "weights", "random_weights", "num_classes", "model_args", "labels", "unsafe_pickle"),
        *("img_size", "crop_pct", "interpolation", "mean", "std"),
    ]
    taken = {name: options.pop(name) for name in names}
    return ModelSource(name=options.pop("model"), **taken)


def load_recipes(names: Sequence[str]) -> list[Recipe]:
    """Shipped names and files, also separated by commas; the same one twice is an error."""
    from edgevit.recipe import load_recipe

    wanted = [part for name in names for part in name.split(",") if part]
    recipes = [load_recipe(name) for name in wanted]
    seen: set[str] = set()
    for recipe in recipes:
        if recipe.name in seen:
            raise UsageError(f"two recipes are called {recipe.name!r}", hint="edgevit recipes")
        seen.add(recipe.name)
    return recipes


def chosen_formats(chosen: Sequence[str]) -> tuple[str, ...]:
    """The formats that ``--format`` names, each once, in the order named."""
    named = [f for one in chosen for f in (("onnx", "tflite") if one == "all" else (one,))]
    return tuple(dict.fromkeys(named))


def build_requests(options: dict[str, Any], source: ModelSource, profiles: Sequence[Profile]) -> list[BuildRequest]:
    """One request a recipe; takes the values of :func:`build_options` out of ``options`` (``sign_key`` stays)."""
    from edgevit.build import BuildRequest

    formats = options.pop("model_formats")
    data = {name: options.pop(name) for name in ("batch", "eval_data", "calib_data", "train_data")}
    return [
        BuildRequest(source=source, recipe=recipe, profiles=tuple(profiles), formats=formats, **data)
        for recipe in load_recipes(options.pop("recipes"))
    ]
