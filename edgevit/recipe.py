"""Recipes: the ordered, typed steps that turn a model into a smaller one. No model inside; a digest says what a recipe does."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from edgevit.cache import digest_of
from edgevit.compress.distil import DistilConfig
from edgevit.compress.low_rank import LowRankConfig
from edgevit.compress.merge_tokens import MergeTokensConfig
from edgevit.compress.prune import PruneConfig
from edgevit.compress.quantize import QuantizeConfig
from edgevit.errors import UnknownName
from edgevit.yamlsource import load_yaml, validate

RECIPE_SCHEMA = "edgevit.recipe/1"

Needs = Literal["no data", "unlabelled images", "labelled images"]


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Quantizations = Annotated[
    Annotated[QuantizeConfig, Tag("one")]
    | Annotated[tuple[QuantizeConfig, ...], Field(min_length=1, max_length=20), Tag("several")],
    Discriminator(_one_or_several),
]
"""``quantize:`` of a recipe: one precision, or a list of them, the variants of one model."""


class StepEntry(BaseModel):
    """One entry of ``steps``: a single key, the kind of step, with its settings below it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    merge_tokens: MergeTokensConfig | None = Field(default=None, description="merge tokens that look alike")
    distil: DistilConfig | None = Field(default=None, description="training by the model: of what steps left, or of a student")
    low_rank: LowRankConfig | None = Field(default=None, description="products of matrices of lower rank")
    prune: PruneConfig | None = Field(default=None, description="fewer heads, hidden units and blocks, or thinner heads")
    quantize: Quantizations | None = Field(
        default=None, description="precision; always the last step. A list of several makes variants of one model"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> StepEntry:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(
                f"got {len(given)} kinds of step ({', '.join(given) or 'none'}), expected one of {kinds} in each entry"
            )
        return self

    @property
    def kind(self) -> str:
        return next(k for k in type(self).model_fields if getattr(self, k) is not None)

    @property
    def varied_kind(self) -> str:
        """The kind, with the variety behind it where the settings decide what models the step applies to."""
        return f"{self.kind} {self.configs[0].variety}".strip()

    @property
    def configs(self) -> tuple[Any, ...]:
        """The settings: one, or one a variant where ``quantize`` is a list."""
        config = getattr(self, self.kind)
        return config if isinstance(config, tuple) else (config,)

    @property
    def config(self) -> Any:
        """The settings of a step that has one set of them, as every structural step does."""
        (config,) = self.configs
        return config


class RewriteConfig(BaseModel):
    """``rewrite:`` of a recipe: exact rewrites, each proven equal in every build; all are tried unless switched off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    branches: bool = Field(default=True, description="join parallel branches (FastViT, RepViT, LeViT) into one layer")
    batch_norm: bool = Field(default=True, description="fold BatchNorm into the convolution before it")
    layer_scale: bool = Field(default=True, description="fold LayerScale into the layer whose output it scales")
    norm_affine: bool = Field(default=True, description="fold LayerNorm's scale and shift into the linear layers behind it")
    class_token: bool = Field(default=True, description="the last block computes only what the class token needs")
    attention: bool = Field(default=True, description="lay attention out with the fewest transposes, scale folded")
    centre: bool = Field(default=True, description="keep the residual stream at mean zero: LayerNorm divides alone")
    pixels: bool = Field(default=True, description="take uint8 pixels: normalisation folded into the first convolution")
    patches: bool = Field(default=True, description="embed patches by a linear layer in place of a convolution")

    @property
    def off(self) -> tuple[str, ...]:
        """The rewrites switched off."""
        return tuple(name for name in type(self).model_fields if not getattr(self, name))


class Recipe(BaseModel):
    """A recipe file. ``name`` and ``summary`` are for people and leave the digest alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["edgevit.recipe/1"] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)
    summary: str = Field(min_length=3, max_length=400)
    steps: tuple[StepEntry, ...] = Field(min_length=1, max_length=50)
    rewrite: RewriteConfig = Field(default=RewriteConfig(), description="exact rewrites before quantize; all, unless said")

    @model_validator(mode="after")
    def _sensible_order(self) -> Recipe:
        kinds = [s.kind for s in self.steps]
        if kinds.count("quantize") != 1:
            raise ValueError(f"steps: got {kinds.count('quantize')} quantize steps, expected exactly one")
        if kinds[-1] != "quantize":
            raise ValueError(f"steps: quantize is step {kinds.index('quantize') + 1} of {len(kinds)}, expected it last")
        for i, step in enumerate(self.steps):
            reason = next((r for r in (c.out_of_place(kinds[:i]) for c in step.configs) if r), "")
            if reason:
                raise ValueError(f"steps: {step.kind} is step {i + 1} of {len(kinds)}, {reason}")
        twice = sorted({scheme for scheme in self.schemes if self.schemes.count(scheme) > 1})
        if twice:
            raise ValueError(f"steps: quantize names {', '.join(twice)} more than once, expected each scheme once")
        return self

    @property
    def quantizations(self) -> tuple[QuantizeConfig, ...]:
        """The last step: one set of settings for each variant of the model, with distinct schemes."""
        return self.steps[-1].configs

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(config.scheme for config in self.quantizations)

    @property
    def needs(self) -> Needs:
        """What data the steps cannot do without."""
        configs = [config for step in self.steps for config in step.configs]
        if any(config.needs_labels for config in configs):
            return "labelled images"
        return "unlabelled images" if any(config.needs_images for config in configs) else "no data"

    @property
    def images(self) -> int:
        """The most calibration images any step looks at."""
        return max((c.images for s in self.steps for c in s.configs if c.uses_images), default=0)

    @property
    def trains(self) -> bool:
        """Whether a step learns over many passes, on the images of ``--train``."""
        return any(c.trains for s in self.steps for c in s.configs)

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe does: the canonical JSON of everything but name and summary, and but ``rewrite`` where
        nothing is switched off."""
        aside = {"name", "summary"} if self.rewrite.off else {"name", "summary", "rewrite"}
        return digest_of(self.model_dump(mode="json", by_alias=True, exclude=aside))


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or a person's own by path (anything that ends in ``.yaml`` or holds a ``/``).

    Raises :class:`UnknownName` with the nearest names, or :class:`ConfigError` with every problem of the file.
    """
    return validate(load_yaml(_source(name_or_path)), Recipe)


def recipe_text(name_or_path: str) -> str:
    """The file of :func:`load_recipe` as it is written."""
    return _source(name_or_path).read_text(encoding="utf-8")


def list_recipes() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in _shipped().iterdir() if f.name.endswith(".yaml"))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def _shipped() -> Traversable:
    return resources.files("edgevit") / "recipes"


def _source(name_or_path: str) -> Path | Traversable:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        return Path(name_or_path)
    known = list_recipes()
    if name_or_path not in known:
        raise UnknownName("recipe", name_or_path, known, hint="edgevit recipes")
    return _shipped() / f"{name_or_path}.yaml"
