"""``edgevit key``: the SSH key that signs bundles, and who may sign for a target."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import click

from edgevit.cli.connect import at_once_option
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
@click.option("--signers", "file", type=FILE, help="Instead of one key: every line of this allowed-signers file.")
@click.option("--replace", "--only", "replace", is_flag=True, help="Take every other signer away.")
@at_once_option
def allow(
    targets: Sequence[str], sign_key: Path | None, name: str | None, file: Path | None, replace: bool, at_once: int
) -> int:
    """Let a key sign for TARGETs. Deploying never does this: whoever may deploy is decided here and by provisioning.

    One allowed-signers file for a whole fleet: `edgevit key allow tag:lab --signers FILE --replace`.
    """
    from edgevit import signing
    from edgevit.cli.connect import Session, each_target
    from edgevit.fleet.audit import Action, Detail

    details: dict[str, Detail]
    if file is not None:
        if sign_key is not None or name is not None:
            raise UsageError("--signers names the keys and their names itself", hint="leave --sign-key and --signer out")
        lines = signing.read_signers(file)
        details = {"signers": len(lines), "file": str(file), "only": replace}
    else:
        public = signing.public_line(sign_key or signing.default_key_path())
        lines = [signing.allowed_signers_line(name or principal(), public)]
        details = {"key": signing.fingerprint(public), "signer": name or principal(), "only": replace}

    def work(session: Session) -> int:
        return session.agent.allow(lines, replace=replace)

    done, code = each_target(targets, work, sign_key=sign_key, action=Action("key allow", details), at_once=at_once)
    for target, signers in done:
        click.echo(f"{target}: {signers} signer{'s' if signers != 1 else ''} allowed")
    return code


@key.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--sign-key", type=FILE, help="The key to revoke, or its public half.")
@click.option("--fingerprint", "fingerprints", multiple=True, metavar="SHA256:…", help="Or its fingerprint; several allowed.")
@at_once_option
def revoke(targets: Sequence[str], sign_key: Path | None, fingerprints: Sequence[str], at_once: int) -> int:
    """Take a key's right to sign for TARGETs away: what it signed is neither installed nor activated there any more.

    What is active stays active; `edgevit fleet check` reports it. Rotate a key: allow the new one, deploy what it signed,
    revoke the old one.
    """
    from edgevit import signing
    from edgevit.cli.connect import Session, each_target
    from edgevit.fleet.audit import Action

    wanted = list(fingerprints)
    if sign_key is not None:
        wanted.append(signing.fingerprint(signing.public_line(sign_key)))
    if not wanted:
        raise UsageError("which key?", hint="edgevit key revoke TARGET --sign-key KEY.pub, or --fingerprint SHA256:…")
    for one in wanted:
        if re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", one) is None:
            raise UsageError(f"--fingerprint: got {one!r}, expected SHA256: and 43 characters", hint="ssh-keygen -lf KEY.pub")

    def work(session: Session) -> tuple[int, int]:
        removed, left = session.agent.revoke(wanted)
        session.note(removed=removed)
        return removed, left

    action = Action("key revoke", {"key": ", ".join(wanted)})
    done, code = each_target(targets, work, action=action, at_once=at_once)
    for target, (removed, left) in done:
        what = "it was not allowed to sign" if not removed else "revoked"
        click.echo(f"{target}: {what}; {left} signer{'s' if left != 1 else ''} allowed")
        if not left:
            say(f"{target}: nobody may sign for it now; edgevit key allow {target}")
    return code
