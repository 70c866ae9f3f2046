"""Study files: which recipes, models, formats, boards and targets make up a grid, with names that ``--set`` fills in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgevit.cache import digest_of
from edgevit.errors import ConfigError, EdgevitError, UnknownName, UsageError
from edgevit.model import ModelSource
from edgevit.recipe import Recipe, StepEntry, load_recipe
from edgevit.yamlsource import YamlDocument, load_yaml, validate

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
_FILES = ("weights", "labels", "calib", "eval", "train")
"""Keys of a model that hold paths: those of a study file are relative to it, those of ``--set`` to the working directory."""


class Setting(BaseModel):
    """A name that stands as ``${name}`` in the rest of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = Field(description="what it is, shown where it is missing", min_length=3, max_length=200)
    default: str | None = Field(default=None, description="what it is where --set does not say")
    optional: bool = Field(default=False, description="what holds only this name is nothing where it is not set")


class ModelEntry(BaseModel):
    """One model with its weights and its images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="a timm name, or package.module:factory", min_length=1, max_length=200)
    title: str = Field(default="", description="what tables call it; default: its name", max_length=100)
    example: Literal["digits"] | None = Field(
        default=None, description="edgevit's own digits: images and weights are made the first time"
    )
    weights: str | None = Field(default=None, description="safetensors or .pth")
    pretrained: bool = Field(default=False, description="weights from the hub, through timm")
    random_weights: bool = Field(default=False, description="seeded random weights: latency only")
    num_classes: int | None = Field(default=None, ge=1, description="classes, where the weights do not say")
    img_size: int | None = Field(default=None, ge=8, description="pixels a side; default: what the weights were made for")
    model_args: dict[str, bool | int | float | str] = Field(default_factory=dict, description="passed to the constructor")
    labels: str | None = Field(default=None, description="class names: one a line, or JSON")
    calib: str | None = Field(default=None, description="unlabelled images for calibration and parity")
    eval: str | None = Field(default=None, description="labelled images; top-1 is counted on the targets")
    train: tuple[str, ...] = Field(default=(), description="images that training steps learn from; default: calib")

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        given = [n for n in ("example", "weights", "pretrained", "random_weights") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                f"got {len(given)} sources of weights ({', '.join(given) or 'none'}), expected one of example, weights, "
                "pretrained, random_weights"
            )
        return self


class InlineRecipe(BaseModel):
    """A recipe written in the study itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)
    summary: str = Field(default="written in the study", min_length=3, max_length=400)
    steps: tuple[StepEntry, ...] = Field(min_length=1, max_length=50)

    @model_validator(mode="after")
    def _is_a_recipe(self) -> InlineRecipe:
        try:
            self.recipe()
        except ValidationError as e:
            said = [str(one.get("ctx", {}).get("error", one["msg"])) for one in e.errors(include_url=False)]
            raise ValueError("; ".join(said)) from e
        return self

    def recipe(self) -> Recipe:
        return Recipe(schema="edgevit.recipe/1", name=self.name, summary=self.summary, steps=self.steps)


class StudyFile(BaseModel):
    """A study file."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["edgevit.study/1"] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)
    summary: str = Field(min_length=3, max_length=400)
    settings: dict[str, Setting] = Field(default_factory=dict, description="names for --set NAME=VALUE")
    models: tuple[ModelEntry, ...] = Field(min_length=1, max_length=20)
    recipes: tuple[str | InlineRecipe, ...] = Field(
        min_length=1, max_length=100, description="shipped names, paths of recipe files, or recipes written here"
    )
    formats: tuple[Literal["onnx", "tflite", "ort"], ...] = Field(
        default=("onnx",), min_length=1, max_length=3, description="which files each recipe is exported to"
    )
    targets: tuple[str, ...] = Field(default=("local",), max_length=50, description="where cells are measured")
    profiles: tuple[str, ...] = Field(default=(), max_length=50, description="more boards that the files must be fit for")
    plan: Literal["quick", "standard"] = Field(default="standard", description="how long each cell is timed")
    threads: tuple[int, ...] = Field(default=(1,), min_length=1, max_length=8, description="threads each cell is timed with")
    batch: int = Field(default=1, ge=1, le=1024, description="images per inference")


@dataclass(frozen=True)
class StudyModel:
    """A model of a study: where it comes from and its images."""

    title: str
    source: ModelSource
    calib: Path | None
    eval: Path | None
    train: tuple[Path, ...]
    example: str | None


@dataclass(frozen=True)
class Study:
    """A study with every name filled in. ``digest`` is of what it asks for, whatever it is called."""

    name: str
    summary: str
    models: tuple[StudyModel, ...]
    recipes: tuple[Recipe, ...]
    formats: tuple[str, ...]
    targets: tuple[str, ...]
    profiles: tuple[str, ...]
    plan: str
    threads: tuple[int, ...]
    batch: int

    @property
    def digest(self) -> str:
        return digest_of(
            [vars(m) for m in self.models],
            [[r.name, r.digest] for r in self.recipes],
            [self.formats, self.targets, self.profiles, self.plan, self.threads, self.batch],
        )


def load_study(name_or_path: str, settings: Mapping[str, str] | None = None) -> Study:
    """A shipped study by name, or a person's own by path (anything that ends in ``.yaml`` or holds a ``/``).

    Raises :class:`ConfigError` with every problem of the file, each with its line; :class:`UsageError` naming every setting
    that is missing; :class:`UnknownName` for a study or a setting there is none of.
    """
    source = _source(name_or_path)
    document = load_yaml(source)
    filled = _fill(document, settings or {}, name_or_path)
    file = validate(filled, StudyFile)
    base = source.absolute().parent if isinstance(source, Path) else Path.cwd()
    recipes = _recipes(filled, file, base)
    titles = [m.title or m.name for m in file.models]
    for i, title in enumerate(titles):
        if title in titles[:i]:
            problem = filled.problem(("models", i), f"two models are called {title!r}; give one a title of its own")
            raise ConfigError([problem])
    return Study(
        file.name, file.summary, tuple(_model(m, base) for m in file.models), recipes,
        tuple(dict.fromkeys(file.formats)), tuple(dict.fromkeys(file.targets)), tuple(dict.fromkeys(file.profiles)),
        file.plan, tuple(dict.fromkeys(file.threads)), file.batch,
    )  # fmt: skip


def _fill(document: YamlDocument, given: Mapping[str, str], study: str) -> YamlDocument:
    """The document with every ``${name}`` filled in. Where ``settings`` itself is wrong, it is left for :func:`validate`."""
    value = document.value
    declared = value.get("settings", {}) if isinstance(value, dict) else {}
    try:
        known = {name: Setting.model_validate(one, strict=True) for name, one in declared.items()}
    except (ValueError, AttributeError):
        return document
    for name in given:
        if name not in known:
            raise UnknownName("setting", name, known, hint=f"edgevit study {study} --set NAME=VALUE")
    values = {name: given.get(name, one.default) for name, one in known.items()}
    missing = [name for name, one in known.items() if values[name] is None and not one.optional]
    if missing:
        wanted = "".join(f"\n  --set {name}=…  {known[name].about}" for name in missing)
        raise UsageError(
            f"{document.name}: {len(missing)} settings are missing:{wanted}",
            hint=f"edgevit study {study} {' '.join(f'--set {name}=…' for name in missing)}",
        )
    problems: list[str] = []
    body = {k: _filled(v, (k,), values, set(given), document, problems) for k, v in value.items() if k != "settings"}
    if problems:
        raise ConfigError(problems)
    return replace(document, value={**body, "settings": declared} if declared else body)


def _filled(
    value: Any,
    place: tuple[Any, ...],
    values: Mapping[str, str | None],
    given: set[str],
    document: YamlDocument,
    out: list[str],
) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, (*place, k), values, given, document, out) for k, v in value.items()}
    if isinstance(value, list):
        entries = [_filled(v, (*place, i), values, given, document, out) for i, v in enumerate(value)]
        return [e for e, before in zip(entries, value, strict=True) if e is not None or before is None]
    if not isinstance(value, str):
        return value
    names = _PLACEHOLDER.findall(value)
    for name in names:
        if name not in values:
            out.append(document.problem(place, str(UnknownName("setting", name, values))))
            return value
    if len(names) == 1 and value == f"${{{names[0]}}}" and values[names[0]] is None:
        return None
    text = _PLACEHOLDER.sub(lambda m: values[m.group(1)] or "", value)
    is_path = place[0] == "models" and any(key in _FILES for key in place[2:])
    if is_path and names and names[0] in given:
        return str(Path(text).expanduser().absolute())
    return text


def _recipes(document: YamlDocument, file: StudyFile, base: Path) -> tuple[Recipe, ...]:
    found: list[Recipe] = []
    problems: list[str] = []
    for i, entry in enumerate(file.recipes):
        try:
            recipe = entry.recipe() if isinstance(entry, InlineRecipe) else load_recipe(_recipe_source(entry, base))
        except ConfigError as e:
            problems += e.problems
            continue
        except EdgevitError as e:
            problems.append(document.problem(("recipes", i), str(e)))
            continue
        if recipe.name in [r.name for r in found]:
            problems.append(document.problem(("recipes", i), f"two recipes are called {recipe.name!r}"))
        if len(recipe.schemes) > 1:
            several = (
                f"{recipe.name!r} has {len(recipe.schemes)} variants ({', '.join(recipe.schemes)}), expected recipes of one"
            )
            problems.append(document.problem(("recipes", i), several))
        found.append(recipe)
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _recipe_source(entry: str, base: Path) -> str:
    return str(base / entry) if entry.endswith((".yaml", ".yml")) or "/" in entry else entry


def _model(entry: ModelEntry, base: Path) -> StudyModel:
    def path(text: str | None) -> Path | None:
        return None if text is None else base / Path(text).expanduser()

    source = ModelSource(
        name=entry.name,
        weights=path(entry.weights),
        pretrained=entry.pretrained,
        random_weights=entry.random_weights,
        num_classes=entry.num_classes,
        model_args=dict(entry.model_args),
        labels=path(entry.labels),
        img_size=entry.img_size,
    )
    train = tuple(base / Path(t).expanduser() for t in entry.train)
    return StudyModel(entry.title or entry.name, source, path(entry.calib), path(entry.eval), train, entry.example)


def list_studies() -> list[str]:
    """The names of the shipped studies, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in _shipped().iterdir() if f.name.endswith(".yaml"))


def study_schema() -> dict[str, Any]:
    """JSON Schema of a study file, for editors."""
    return StudyFile.model_json_schema(by_alias=True)


def _shipped() -> Traversable:
    return resources.files("edgevit") / "studies"


def _source(name_or_path: str) -> Path | Traversable:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        return Path(name_or_path)
    known = list_studies()
    if name_or_path not in known:
        raise UnknownName("study", name_or_path, known, hint="give one of these, or the path of a .yaml file")
    return _shipped() / f"{name_or_path}.yaml"
