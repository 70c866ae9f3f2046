"""Commands for people on the device itself: what is active and where it lies, and what it says of an image."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

from device_agents.errors import Refused
from device_agents.store import Store

EXIT_REFUSED = 1


def main(root: str, argv: List[str]) -> int:
    """Run one command at ``root``: 0, 1 where it is refused (the reason on standard error), 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="edgevit_device.py", description="The active bundle at {}.".format(root))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("active", help="what is active and where its files lie, as JSON")
    predict = commands.add_parser(
        "predict", help="the likeliest classes of images: .npy, and JPEG or PNG where Pillow is there"
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--top", type=int, default=5, help="how many classes of each (default: 5)")
    predict.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "active":
            from device_agents.api import describe_active

            _say(json.dumps(describe_active(Store(Path(root))), indent=2, ensure_ascii=False))
        else:
            _predict(root, arguments.images, max(arguments.top, 1), arguments.json)
    except Refused as e:
        sys.stderr.write("{}: {}\n{}".format(e.code, e, "next: {}\n".format(e.hint) if e.hint else ""))
        return EXIT_REFUSED
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _predict(root: str, images: List[str], top: int, as_json: bool) -> None:
    from device_agents.api import load_active

    model = load_active(root, automatic=False)
    rows = []
    for path in images:
        guesses = model.classify(path, top)
        rows.append(
            {"image": path, "top": [{"label": g.label, "probability": g.probability, "index": g.index} for g in guesses]}
        )
        if not as_json:
            _say(path)
            for g in guesses:
                _say("  {:5.1f} %  {}".format(100 * g.probability, g.label or "class {}".format(g.index)))
    if as_json:
        active = model.active
        document: Dict[str, Any] = {
            "schema": "edgevit.predict-on-device/1",
            "bundle": active.variant.bundle,
            "name": active.bundle_name,
            "version": active.bundle_version,
            "artifact": active.variant.artifact,
            "images": rows,
        }
        _say(json.dumps(document, indent=2, ensure_ascii=False))
