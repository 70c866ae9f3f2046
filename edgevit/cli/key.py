"""``edgevit key``: the SSH key that signs bundles, and who may sign for a target."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from pathlib import Path

import click

from edgevit.cli.console import emit_json, json_option, say
from edgevit.cli.model_options import FILE
from edgevit.errors import UsageError


def principal() -> str:
    """How this operator is called in allowed-signers files."""
    return f"{getpass.getuser()}@{socket.gethostname()}".replace(" ", "-")


@click.group()
def key() -> None:
    """The SSH key that signs bundles, and who may sign for a target."""


@key.command()
@click.option("--sign-key", type=FILE, help="Where to make it; default: edgevit's own place.")
def make(sign_key: Path | None) -> None:
    """Make an ed25519 key without a passphrase. A key you already have works too: pass it to --sign-key."""
    from edgevit import signing

    path = sign_key or signing.default_key_path()
    if path.exists():
        raise UsageError(f"{path} exists already; nothing was changed", hint="edgevit key show")
    signing.make_key(path, f"edgevit {principal()}")
    say(f"made {path}")
    click.echo(f"{signing.fingerprint(signing.public_line(path))}  {path}.pub")


@key.command()
@click.option("--sign-key", type=FILE, help="Another key than edgevit's own.")
@json_option
def show(sign_key: Path | None, as_json: bool) -> None:
    """The public half: fingerprint, and the line a device's allowed-signers file holds."""
    from edgevit import signing

    path = sign_key or signing.default_key_path()
    if not path.exists():
        raise UsageError(f"there is no signing key at {path}", hint="edgevit key make")
    public = signing.public_line(path)
    line = signing.allowed_signers_line(principal(), public)
    if as_json:
        emit_json("key", {"path": str(path), "fingerprint": signing.fingerprint(public), "allowed_signers": line})
        return
    click.echo(f"{signing.fingerprint(public)}  {path}")
    click.echo(line)


@key.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--sign-key", type=FILE, help="The key to allow; default: edgevit's own. A public key file works too.")
@click.option("--signer", "name", help="The name it gets in the target's allowed-signers file; default: you@this-host.")
@click.option("--only", is_flag=True, help="Take every other signer away.")
def allow(targets: Sequence[str], sign_key: Path | None, name: str | None, only: bool) -> int:
    """Let a key sign for TARGETs. Deploying never does this: whoever may deploy is decided here and by provisioning."""
    from edgevit import signing
    from edgevit.cli.connect import Session, each_target
    from edgevit.fleet.audit import Action, Detail

    path = sign_key or signing.default_key_path()
    public = signing.public_line(path)
    line = signing.allowed_signers_line(name or principal(), public)
    details: dict[str, Detail] = {"key": signing.fingerprint(public), "signer": name or principal(), "only": only}

    def work(session: Session) -> int:
        return session.agent.allow([line], replace=only)

    done, code = each_target(targets, work, sign_key=path, action=Action("key allow", details))
    for target, signers in done:
        click.echo(f"{target}: {signers} signer{'s' if signers != 1 else ''} allowed")
    return code
