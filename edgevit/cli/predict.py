"""``edgevit predict``: a person's own images through a bundle on a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edgevit.cli.connect import open_session, select_targets
from edgevit.cli.console import emit_json, json_option
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UsageError


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("target")
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
@click.option("--artifact", help="Which artifact; default: the active one if BUNDLE is active there, else the first that runs.")
@json_option
def predict(bundle: Path, target: str, images: Sequence[Path], artifact: str | None, as_json: bool) -> None:
    """Run IMAGEs through BUNDLE on TARGET: the five likeliest labels of each (numbers of classes that have no name).

    The image is decoded and cropped here exactly as the model wants it; everything after that happens on the device.
    """
    from edgevit.bundle import open_bundle
    from edgevit.data import load_pixels
    from edgevit.variants import find_variant, list_variants, require_runnable

    targets = select_targets([target])
    if len(targets) != 1:
        raise UsageError(f"{target} means {len(targets)} targets, expected one")
    opened = open_bundle(bundle, None)
    loaded = [load_pixels(path, opened.manifest.preprocessing) for path in images]
    import numpy as np  # after load_pixels, which names the extra that brings it

    pixels = np.stack(loaded)
    with open_session(targets[0]) as session, showing_progress() as progress:
        facts = session.agent.probe()
        found = require_runnable(list_variants(opened.manifest, opened.digest, facts, session.profile(facts)), target, facts)
        active = facts.active.variant if facts.active is not None and facts.active.variant.bundle == opened.digest else None
        variant = find_variant(found, artifact) if artifact else active or found.variants[0]
        session.agent.install(opened, progress, allow_older=True)  # it replaces nothing
        predictions = session.agent.predict(pixels, variant)
    if as_json:
        rows = [{"image": str(path), "top5": top} for path, top in zip(images, predictions, strict=True)]
        emit_json("predict", {"target": target, "artifact": variant.artifact, "runtime": variant.runtime, "images": rows})
        return
    for path, top in zip(images, predictions, strict=True):
        click.echo(f"{path}")
        for guess in top:
            click.echo(f"  {100 * float(guess['probability']):5.1f} %  {guess['label'] or 'class ' + str(guess['index'])}")
    click.echo(f"({variant.artifact} in {variant.runtime} on {target})", err=True)
