"""Write the tables of docs/recipes.md from the step configurations and the shipped recipes; ``--check`` fails where they lag.

A table stands between ``<!-- generated: options KIND -->`` or ``<!-- generated: recipes -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "recipes.md"
BLOCK = re.compile(r"(<!-- generated: ([a-z_ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def step_configs() -> dict[str, type[BaseModel]]:
    """Kind of step → the class of its settings."""
    from edgevit.recipe import StepEntry

    found = {}
    for kind, field in StepEntry.model_fields.items():
        (config,) = {p for p in _parts(field.annotation) if isinstance(p, type) and issubclass(p, BaseModel)}
        found[kind] = config
    return found


def options(config: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(option, values, default, what it is) of each setting, those of a setting's own settings below it."""
    rows = []
    for name, field in config.model_fields.items():
        nested = [a for a in _parts(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        rows.append((f"{prefix}{name}", _values(field), _default(field), field.description or ""))
        for one in nested:
            rows += options(one, f"{prefix}{name}.")
    return rows


def _parts(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [p for a in typing.get_args(annotation) for p in _parts(a)]
    return [annotation]


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _values(field: FieldInfo) -> str:
    limits = [_limit(one) for one in field.metadata]
    return " or ".join(dict.fromkeys(_word(p) for p in _parts(field.annotation))) + "".join(f", {x}" for x in limits if x)


def _word(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (tuple, list):
        return f"list of {_word(arguments[0])}"
    if origin is dict:
        return f"{_word(arguments[0])} → {' or '.join(_word(a) for a in _parts(arguments[1]))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "settings below"
    return _WORDS.get(annotation, str(annotation))


def _limit(one: Any) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    return " ".join(f"{sign} {getattr(one, name):,g}" for name, sign in signs if getattr(one, name, None) is not None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple | list):
        return ", ".join(f"`{v}`" for v in value) or "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value is None or value == {} else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)


def generated(what: str) -> str:
    """The text of one block."""
    from edgevit.recipe import list_recipes, load_recipe

    if what == "recipes":
        loaded = [load_recipe(name) for name in list_recipes()]
        rows: list[tuple[str, ...]] = [
            (
                f"`{r.name}`",
                ", ".join(s.kind for s in r.steps[:-1]) or "–",
                ", ".join(f"`{s}`" for s in r.schemes),
                r.needs,
                r.summary,
            )
            for r in loaded
        ]
        return table(("recipe", "steps before `quantize`", "scheme", "needs", "what it does"), rows)
    config = step_configs()[what.removeprefix("options ")]
    return table(("option", "values", "default", "what it is"), [(f"`{n}`", v, d, w) for n, v, d, w in options(config)])


def text(now: str) -> str:
    """``now`` with every block written anew."""
    return BLOCK.sub(lambda m: m.group(1) + "\n" + generated(m.group(2)) + "\n" + m.group(3), now)


if __name__ == "__main__":
    now = TARGET.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        if text(now) != now:
            sys.exit("docs/recipes.md lags behind the steps and recipes; type: python scripts/recipe_docs.py")
    else:
        TARGET.write_text(text(now), encoding="utf-8")
        print(f"wrote {TARGET}")
