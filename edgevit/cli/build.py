"""``edgevit build``: compress and export a model into signed bundles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.console import emit_json, json_option, out, say
from edgevit.cli.model_options import FILE, build_options, build_requests, model_options, model_source
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from edgevit.build import BuildRequest
    from edgevit.bundle import Bundle
    from edgevit.profile import Profile


@click.command()
@model_options
@build_options
@click.option("--profile", "profile_names", multiple=True, metavar="P", help="A kind of board; several allowed.")
@click.option("--for", "targets", multiple=True, metavar="TARGET", help="The profiles of these targets.")
@click.option(
    "-o", "--output", type=FILE, required=True, metavar="DIR", help="Where the bundle goes (one folder a recipe if several)."
)
@json_option
def build(profile_names: Sequence[str], targets: Sequence[str], output: Path, as_json: bool, **options: Any) -> None:
    """Compress and export MODEL (a timm name or package.module:factory) into signed bundles, one a recipe.

    Each holds every format asked for, checked against the PyTorch module and read back. Which boards: --profile or --for.
    """
    profiles = choose_profiles(profile_names, targets)
    requests = build_requests(options, model_source(options), profiles)
    bundles = build_all(requests, output, options["sign_key"])
    if as_json:
        emit_json("build", {"bundles": [bundle_json(b) for b in bundles]})
        return
    from edgevit.report.bundle_view import render_bundle

    for bundle in bundles:
        out().print(render_bundle(bundle))


def choose_profiles(profile_names: Sequence[str], targets: Sequence[str]) -> list[Profile]:
    """The profiles named, and those of the targets named; each once. Neither is an error: no default that guesses."""
    from edgevit.profile import load_profile

    names = [part for name in profile_names for part in name.split(",") if part]
    if targets:
        from edgevit.cli.connect import target_profile
        from edgevit.fleet.inventory import load_fleet, select
        from edgevit.places import fleet_path

        names += [target_profile(target) for target in select(load_fleet(fleet_path()), targets)]
    if not names:
        raise UsageError("which boards is this for? expected --profile P or --for TARGET", hint="edgevit profiles")
    return [load_profile(name) for name in dict.fromkeys(names)]


def build_all(requests: Sequence[BuildRequest], output: Path, sign_key: Path | None) -> list[Bundle]:
    """Build each request: into ``output`` itself when it is the only one, else into a folder named for its recipe."""
    from edgevit.build import build_bundle
    from edgevit.cli.progress_context import showing_progress
    from edgevit.outputs import verify_writable_folder

    verify_writable_folder(output)
    sign = signer(sign_key)
    bundles = []
    with showing_progress() as progress:
        for request in requests:
            place = output if len(requests) == 1 else output / request.recipe.name
            bundles.append(build_bundle(request, place, sign, progress))
    return bundles


def signer(sign_key: Path | None) -> Callable[[bytes], bytes]:
    """What signs, with :func:`signing_key`."""
    from edgevit import signing

    chosen = signing_key(sign_key)
    return lambda data: signing.sign(data, chosen)


def signing_key(sign_key: Path | None) -> Path:
    """The person's own SSH key, else edgevit's, made (and said so) the first time one is needed. UsageError where it is none:
    before minutes of building, not after."""
    from edgevit import signing

    key = sign_key
    if key is None:
        key = signing.default_key_path()
        if not key.exists():
            signing.make_key(key, "edgevit signing key")
            public = signing.public_line(key)
            say(f"made a signing key: {key} ({signing.fingerprint(public)}); `edgevit key show` prints it")
    signing.public_line(key)
    return key


def bundle_json(bundle: Bundle) -> dict[str, Any]:
    """A bundle as commands report it in JSON."""
    from device_agents.wire import encode

    return {"path": str(bundle.path), "digest": bundle.digest, "manifest": encode(bundle.manifest)}
