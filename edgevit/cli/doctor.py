"""``edgevit doctor``: where everything is kept, what is installed, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import click

from edgevit.cli.console import emit_json, json_option, out

# extra → (distribution, what it is for)
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "runtime": (
        ("numpy", "the local target"),
        ("onnxruntime", "the local target, ONNX"),
        ("pillow", "reading images"),
    ),
    "build": (
        ("torch", "building"),
        ("torchvision", "building"),
        ("timm", "building"),
        ("onnx", "ONNX export"),
        ("onnxscript", "ONNX export"),
        ("safetensors", "reading weights"),
        ("scikit-learn", "the demo's digits"),
        ("pyarrow", "parquet data sets"),
    ),
    "tflite": (
        ("litert-torch", "TFLite export"),
        ("ai-edge-quantizer", "TFLite quantization"),
        ("ai-edge-litert", "the local target, TFLite"),
    ),
    "train": (("accelerate", "training on a GPU"),),
    "prune": (("torch-pruning", "pruning channels"),),
    "tune": (("optuna", "searching recipes"),),
    "ray": (("ray", "cells on a Ray cluster"),),
    "figures": (("matplotlib", "plots as SVG"),),
    "postgres": (("psycopg", "results in PostgreSQL"),),
    "mlflow": (("mlflow-skinny", "results to MLflow"),),
}


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Where everything is kept, what is installed, what is missing and how to get it."""
    from edgevit import places, signing
    from edgevit.agentpack import agent_pyz

    kept = {
        "results": places.shown_url(places.db_url()),
        "fleet file": str(places.fleet_path()),
        "signing key": str(signing.default_key_path()),
        "build cache": str(places.cache_dir()),
        "audit log": str(places.audit_path()),
        "outbox": str(places.outbox_dir()),
        "local agent": str(places.local_root()),
    }
    parts = [
        {"part": name, "extra": extra, "version": _version(name), "for": use}
        for extra, members in PARTS.items()
        for name, use in members
    ]
    ssh = _ssh_version()
    missing = sorted({str(p["extra"]) for p in parts if p["version"] is None})
    if as_json:
        emit_json(
            "doctor",
            {"python": platform.python_version(), "agent": agent_pyz().sha256, "places": kept, "parts": parts, "openssh": ssh},
        )
        return 0
    from rich.table import Table

    click.echo(f"edgevit {importlib.metadata.version('edgevit')}, Python {platform.python_version()} ({sys.executable})")
    click.echo(f"agent {agent_pyz().sha256[:16]}, {len(agent_pyz().data) / 1000:.0f} kB\n")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, place in kept.items():
        table.add_row(name, place)
    table.add_row("OpenSSH client", ssh or "missing: sudo apt install openssh-client")
    out().print(table)
    click.echo()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("extra", "package", "version", "for"):
        table.add_column(title)
    for part in parts:
        table.add_row(str(part["extra"]), str(part["part"]), str(part["version"] or "–"), str(part["for"]))
    out().print(table)
    for extra in missing:
        click.echo(f"missing: pip install 'edgevit[{extra}]'")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ssh_version() -> str | None:
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return None
    return subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=10, check=False).stderr.strip() or None
