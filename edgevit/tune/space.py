"""What is searched: structural steps and their strengths, precision, format and threads; a draw as a recipe. Pure.

A draw is a flat mapping of names to values. Strengths are rounded to hundredths, so that a recipe file says all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from edgevit.cache import digest_of
from edgevit.recipe import RECIPE_SCHEMA, Recipe, list_recipes, load_recipe

Value = str | int | float | bool
Draw = Mapping[str, Value]

STEPS = ("prune", "low_rank", "merge_tokens", "distil")
RECOVERIES = (100, 300, 600, 900)
GROUPS = (16, 32, 64, 128)
STRENGTHS = {
    "prune_ratio": (0.03, 0.40),
    "low_rank_ratio": (0.03, 0.35),
    "merge_ratio": (0.05, 0.60),
    "merge_first_share": (0.05, 0.50),
    "merge_second_share": (0.0, 0.50),
    "int8_share": (0.0, 0.60),
    "bits": (3.5, 8.0),
}
"""The least and the most of each, in hundredths."""

SWITCHES = {"prune_ratio": "prune", "low_rank_ratio": "low_rank", "merge_ratio": "merge"}
"""What takes the step of a strength, which can also be left out."""

DEFAULT_ROWS = "default"


@dataclass(frozen=True)
class Space:
    """``precisions``: ``format scheme`` pairs that the boards run; ``steps``: the structural steps that apply; ``depth`` blocks
    see ``tokens`` tokens that may merge (0 where they cannot); ``threads`` in ascending order."""

    precisions: tuple[str, ...]
    steps: tuple[str, ...]
    threads: tuple[int, ...]
    depth: int = 0
    tokens: int = 0


class Trial(Protocol):
    """The part of an Optuna trial that draws."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Drawn:
    """What a draw means: one recipe in one format with so many threads. ``label`` is for people; ``key`` tells draws apart."""

    recipe: Recipe
    format: str
    threads: int
    label: str

    @property
    def key(self) -> str:
        return f"{self.recipe.name} {self.threads}"

    @property
    def scheme(self) -> str:
        (scheme,) = self.recipe.schemes
        return scheme


def draw(trial: Trial, space: Space) -> dict[str, Value]:
    """Draw once. A step is taken or left; only of what is taken is a strength drawn."""
    out: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        out[name] = trial.suggest_categorical(name, choices)
        return out[name]

    def strength(name: str) -> None:
        out[name] = round(trial.suggest_float(name, *STRENGTHS[name], step=0.01), 2)

    precision = str(choose("precision", space.precisions))
    if len(space.threads) > 1:
        choose("threads", space.threads)
    structural = False
    if "prune" in space.steps and choose("prune", (False, True)):
        structural = True
        strength("prune_ratio")
    if "low_rank" in space.steps and choose("low_rank", (False, True)):
        structural = True
        strength("low_rank_ratio")
    if "merge_tokens" in space.steps:
        how = choose("merge", ("none", "share", "places"))
        structural = structural or how != "none"
        if how == "share":
            strength("merge_ratio")
        elif how == "places":
            out["merge_first"] = trial.suggest_int("merge_first", 0, max(0, space.depth - 2))
            out["merge_gap"] = trial.suggest_int("merge_gap", 1, max(1, space.depth // 2))
            strength("merge_first_share")
            strength("merge_second_share")
    if "distil" in space.steps and structural:
        choose("recovery", (0, *RECOVERIES))
    _draw_precision(precision, choose, strength)
    return out


def _draw_precision(precision: str, choose: Any, strength: Any) -> None:
    format_, scheme = precision.split(" ")
    if scheme in ("int8-dynamic", "int8-static"):
        choose("first", ("float", "int8"))
        choose("rows", (DEFAULT_ROWS, 0.0, 0.1, 0.25))
    if scheme == "int4-weights":
        strength("int8_share")
    if scheme == "mixed":
        strength("bits")
    if scheme in ("int4-weights", "mixed") and format_ == "onnx":
        choose("group", GROUPS)


def smallest(space: Space) -> list[dict[str, Value]]:
    """Of each precision the draw that cuts away most."""
    cuts: dict[str, Value] = {}
    for step in ("prune", "low_rank"):
        if step in space.steps:
            cuts |= {step: True, f"{step}_ratio": STRENGTHS[f"{step}_ratio"][1]}
    if "merge_tokens" in space.steps:
        cuts["merge"] = "none"
    fill = {"int8_share": STRENGTHS["int8_share"][0], "bits": STRENGTHS["bits"][0], "group": GROUPS[-1]}
    return [{"precision": precision, **cuts, **fill} for precision in space.precisions]


def recipe_of(drawn: Draw, space: Space) -> Drawn:
    """The recipe of a draw. Raises ``ValidationError`` (pydantic) for a draw of another space."""
    format_, scheme = str(drawn["precision"]).split(" ")
    steps: list[dict[str, Any]] = []
    words: list[str] = []
    if drawn.get("prune"):
        steps.append({"prune": {"ratio": drawn["prune_ratio"]}})
        words.append(f"prune {drawn['prune_ratio']:g}")
    if drawn.get("low_rank"):
        steps.append({"low_rank": {"ratio": drawn["low_rank_ratio"]}})
        words.append(f"low-rank {drawn['low_rank_ratio']:g}")
    merge = _merge(drawn, space)
    if merge:
        steps.append({"merge_tokens": merge})
        places = "".join(f" {n}@{block}" for block, n in merge.get("merge", {}).items())
        words.append(f"merge{places}" if places else f"merge {merge['ratio']:g}")
    if drawn.get("recovery") and steps:
        steps.append({"distil": {"steps": drawn["recovery"]}})
        words.append(f"recover {drawn['recovery']}")
    settings, word = _quantize(drawn, format_, scheme)
    steps.append({"quantize": settings})
    label = " + ".join([*words, word])
    name = f"tune-{format_}-{digest_of(steps)[:10]}"
    recipe = Recipe.model_validate(
        {"schema": RECIPE_SCHEMA, "name": name, "summary": f"found by edgevit tune: {label}", "steps": steps}
    )
    return Drawn(recipe, format_, int(drawn.get("threads", space.threads[-1])), label)


def _merge(drawn: Draw, space: Space) -> dict[str, Any]:
    """Settings of ``merge_tokens``; nothing where none merge. No more than half of the tokens merge at once."""
    how = drawn.get("merge", "none")
    if how == "share":
        return {"ratio": drawn["merge_ratio"]}
    if how == "none":
        return {}
    first = int(drawn["merge_first"])
    second = min(space.depth - 1, first + int(drawn["merge_gap"]))
    merged = min(space.tokens // 2, round(float(drawn["merge_first_share"]) * space.tokens))
    left = space.tokens - merged
    more = min(left // 2, round(float(drawn["merge_second_share"]) * left)) if second > first else 0
    places = {block: count for block, count in ((first, merged), (second, more)) if count > 0}
    return {"merge": places} if places else {}


def _quantize(drawn: Draw, format_: str, scheme: str) -> tuple[dict[str, Any], str]:
    """Settings of ``quantize``, and what to call them."""
    settings: dict[str, Any] = {"scheme": scheme}
    words = [scheme]
    if drawn.get("first", "float") != "float":
        settings["first"] = drawn["first"]
        words.append("first int8")
    if drawn.get("rows", DEFAULT_ROWS) != DEFAULT_ROWS:
        settings["row_share"] = drawn["rows"]
        words.append(f"rows {drawn['rows']:g}")
    if scheme == "int4-weights":
        settings["int8_share"] = drawn["int8_share"]
        words.append(f"int8 {drawn['int8_share']:g}")
    if scheme == "mixed":
        settings["budget"] = {"effective_bits": drawn["bits"]}
        words.append(f"{drawn['bits']:g} bits")
    if scheme in ("int4-weights", "mixed"):
        settings["group"] = drawn["group"] if format_ == "onnx" else None
        words += [f"group {settings['group']}"] if settings["group"] else []
    return settings, " ".join(words)


@lru_cache(maxsize=8)
def seeds(space: Space) -> tuple[dict[str, Value], ...]:
    """The shipped recipes as draws, each once in each format it fits, what cuts and is quantized without training also at half
    its strength: fp32 first, which all others are held against; then what is quick to build and fast to run; what trains
    last."""
    found: list[tuple[tuple[bool, bool, bool, int], dict[str, Value]]] = []
    known = set()
    for name in list_recipes():
        recipe = load_recipe(name)
        for precision in space.precisions if len(recipe.schemes) == 1 else ():
            one = draw_of(recipe, precision, space)
            if one is None:
                continue
            quick = recipe.schemes[0] in ("int8-dynamic", "int8-static")
            rank = (name != "fp32", recipe.trains, not quick, len(recipe.steps))
            wanted = [one]
            if quick and len(recipe.steps) > 1 and not recipe.trains:
                ratios = {k: v / 2 for k, v in one.items() if k.endswith("_ratio") and isinstance(v, float)}
                wanted.append({**one, **{k: round(v, 2) for k, v in ratios.items()}})
            for each in wanted:
                key = recipe_of(each, space).key
                if key not in known:
                    known.add(key)
                    found.append((rank, each))
    return tuple(one for _, one in sorted(found, key=lambda pair: pair[0]))


def draw_of(recipe: Recipe, precision: str, space: Space) -> dict[str, Value] | None:
    """``recipe`` as a draw of ``precision`` (the inverse of :func:`recipe_of`), or None where the space has no such draw."""
    format_, scheme = precision.split(" ")
    quantize = recipe.quantizations[0]
    if (scheme,) != recipe.schemes:
        return None
    out: dict[str, Value] = {"precision": precision}
    if len(space.threads) > 1:
        out["threads"] = space.threads[-1]
    steps = {s.kind: s.config for s in recipe.steps[:-1]}
    if set(steps) - set(space.steps):
        return None
    for kind in ("prune", "low_rank"):
        if kind in space.steps:
            out[kind] = kind in steps
        if kind in steps:
            out[f"{kind}_ratio"] = steps[kind].ratio
    if "merge_tokens" in space.steps:
        merging = steps.get("merge_tokens")
        if merging is not None and merging.ratio is None:
            return None
        out["merge"] = "none" if merging is None else "share"
        if merging is not None:
            out["merge_ratio"] = merging.ratio
    if "distil" in space.steps and len(steps) > ("distil" in steps):
        out["recovery"] = steps["distil"].steps or 0 if "distil" in steps else 0
    elif "distil" in steps:
        return None
    if scheme in ("int8-dynamic", "int8-static"):
        out["first"], out["rows"] = quantize.first, DEFAULT_ROWS if quantize.row_share is None else quantize.row_share
    if scheme == "int4-weights":
        out["int8_share"] = quantize.int8_share
    if scheme == "mixed":
        if quantize.budget is None or quantize.budget.effective_bits is None:
            return None
        out["bits"] = quantize.budget.effective_bits
    if scheme in ("int4-weights", "mixed"):
        if (quantize.group is None) != (format_ == "tflite"):
            return None
        if quantize.group is not None:
            out["group"] = quantize.group
    same = recipe_of(out, space).recipe.digest == recipe.digest
    return out if same else None


def recipe_yaml(recipe: Recipe) -> str:
    """``recipe`` as a file that :func:`edgevit.recipe.load_recipe` reads back to the same digest and name."""
    import io

    from ruamel.yaml import YAML

    writer = YAML()
    writer.default_flow_style = False
    writer.width = 120
    text = io.StringIO()
    writer.dump(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), text)
    return text.getvalue()
