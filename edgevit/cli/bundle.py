"""``edgevit verify`` and ``edgevit explain``: what a bundle is, without a device."""

from __future__ import annotations

from pathlib import Path

import click

from edgevit.cli.build import bundle_json
from edgevit.cli.console import emit_json, json_option, out
from edgevit.cli.model_options import FILE


@click.command()
@click.argument("bundle", type=FILE)
@click.option("--signers", type=FILE, help="An OpenSSH allowed-signers file; default: your own signing key.")
@json_option
def verify(bundle: Path, signers: Path | None, as_json: bool) -> None:
    """Check BUNDLE's signature, who signed it, and every byte of every file in it."""
    from edgevit.bundle import open_bundle
    from edgevit.cli.signers import own_signers

    with own_signers(signers) as path:
        opened = open_bundle(bundle, path)
    blobs = opened.manifest.blobs()
    if as_json:
        emit_json("verify", {"verified": True, "signer": opened.signer, **bundle_json(opened)})
        return
    size = sum(b.size for b in blobs) / 1e6
    click.echo(f"{bundle}: good signature by {opened.signer}; {len(blobs)} blobs, {size:.1f} MB, all as signed")


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("artifact", required=False)
@json_option
def explain(bundle: Path, artifact: str | None, as_json: bool) -> None:
    """What is in BUNDLE, what was done to the model, and how far each ARTIFACT lies from it. Checks bytes, not the signer."""
    from edgevit.bundle import open_bundle
    from edgevit.errors import UnknownName

    opened = open_bundle(bundle, None)
    named = None if artifact is None else opened.manifest.artifact(artifact)
    if artifact is not None and named is None:
        raise UnknownName("artifact", artifact, [a.name for a in opened.manifest.artifacts])
    from edgevit.report.bundle_view import render_explanation, steps_of

    if as_json:
        from device_agents.wire import encode

        steps = [encode(step) for step in steps_of(opened.manifest, artifact)]
        own = {} if named is None else {"artifact": encode(named), "steps": steps}
        emit_json("explain", {**bundle_json(opened), **own})
        return
    out().print(render_explanation(opened, artifact))
