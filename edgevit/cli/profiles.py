"""``edgevit profiles``: the kinds of boards."""

from __future__ import annotations

import click

from edgevit.cli.console import emit_json, json_option, out


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def profiles(ctx: click.Context, as_json: bool) -> None:
    """The kinds of boards edgevit knows, and what is known of each."""
    if ctx.invoked_subcommand is not None:
        return
    from edgevit.profile import profile_titles

    titles = profile_titles()
    if as_json:
        emit_json("profiles", {"profiles": [{"name": name, "title": title} for name, title in titles.items()]})
        return
    from edgevit.report.profile_view import render_profiles

    out().print(render_profiles(titles))


@profiles.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Every fact of one profile, with its source and whether it was measured, is documented, or is unproven."""
    from edgevit.profile import load_profile

    profile = load_profile(name)
    if as_json:
        emit_json("profile", profile.model_dump(mode="json"))
        return
    from edgevit.report.profile_view import render_profile

    out().print(render_profile(profile))
