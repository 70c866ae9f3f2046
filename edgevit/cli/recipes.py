"""``edgevit recipes``: the shipped compression recipes."""

from __future__ import annotations

import click

from edgevit.cli.console import emit_json, json_option, out


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def recipes(ctx: click.Context, as_json: bool) -> None:
    """The shipped compression recipes, and what each needs."""
    if ctx.invoked_subcommand is not None:
        return
    from edgevit.recipe import list_recipes, load_recipe

    loaded = [load_recipe(name) for name in list_recipes()]
    if as_json:
        rows = [{"name": r.name, "summary": r.summary, "needs": r.needs, "digest": r.digest} for r in loaded]
        emit_json("recipes", {"recipes": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("recipe", "needs", "what it does"):
        table.add_column(title, overflow="fold")
    for r in loaded:
        table.add_row(r.name, r.needs, r.summary)
    out().print(table)


@recipes.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """One recipe as it is: copy it to a file to make your own."""
    from edgevit.recipe import load_recipe, recipe_text

    recipe = load_recipe(name)
    if as_json:
        emit_json("recipe", {**recipe.model_dump(mode="json"), "digest": recipe.digest})
        return
    click.echo(recipe_text(name), nl=False)
