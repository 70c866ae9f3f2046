"""``edgevit target``: the boxes edgevit ships to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevit.cli.connect import Session, open_session, select_targets, show_failures, try_each_target
from edgevit.cli.console import emit_json, has_terminal, json_failed, json_option, out, say
from edgevit.cli.daemon import daemon
from edgevit.cli.model_options import FILE
from edgevit.cli.provision import provision, provision_targets, unprovision
from edgevit.cli.prune import prune
from edgevit.errors import EdgevitError, UnknownName, UsageError

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.fleet.inventory import Target

fingerprint_option = click.option(
    "--fingerprint", metavar="SHA256:…", help="Accept the host key if it is this one, without asking."
)


@click.group()
def target() -> None:
    """The boxes edgevit ships to. `local`, the agent on this very machine, always exists."""


target.add_command(daemon)
target.add_command(provision)
target.add_command(unprovision)
target.add_command(prune)


@target.command()
@click.argument("name")
@click.argument("host", metavar="[USER@]HOST")
@click.option("--port", type=click.IntRange(1, 65535))
@click.option("--key", "key_file", type=FILE, help="SSH private key to log in with; default: what ssh would use.")
@click.option("--jump", metavar="[USER@]HOST[:PORT]", help="Go through this host.")
@click.option("--profile", help="The kind of board; default: proposed from what the board calls itself.")
@click.option("--tag", "tags", multiple=True)
@click.option("--python", default="python3", show_default=True, help="Python ≥ 3.8 on the device.")
@click.option("--root", default="~/.edgevit", show_default=True, help="The agent's folder on the device.")
@click.option("--provision/--no-provision", default=None, help="Provision at once; default: ask.")
@fingerprint_option
def add(name: str, host: str, fingerprint: str | None, profile: str | None, provision: bool | None, **settings: Any) -> int:
    """Pin the host key, look at the board, propose its profile, keep it in the fleet file as NAME."""
    from edgevit.fleet.audit import Action, recording
    from edgevit.fleet.connect import trust
    from edgevit.fleet.inventory import LOCAL, add_target, load_fleet, make_target
    from edgevit.places import fleet_path
    from edgevit.profile import load_profile
    from edgevit.transport.prompts import TerminalPrompts

    if profile is not None:
        load_profile(profile)
    if name == LOCAL:
        raise UsageError(
            f"{LOCAL} is this very machine and always exists; give the box another name",
            hint="edgevit target add NAME [USER@]HOST",
        )
    if any(t.name == name for t in load_fleet(fleet_path()).targets):
        raise UsageError(f"a target named {name} exists already", hint=f"edgevit target remove {name}")
    user, _, address = host.rpartition("@")
    key_file: Path | None = settings.pop("key_file")
    new = make_target(
        name=name,
        host=address,
        user=user or None,
        key=str(key_file.expanduser().absolute()) if key_file else None,
        profile=profile,
        tags=tuple(settings.pop("tags")),
        **settings,
    )
    with recording(Action("target add", {"host": host}), new) as record:
        trust(new, TerminalPrompts(), fingerprint, new=True)
        with open_session(new) as session:
            facts = session.agent.probe()
            chosen = session.profile(facts).name
        record.note(profile=chosen)
        new = new.model_copy(update={"profile": chosen})
        add_target(fleet_path(), new)
    say(f"{name}: {facts.board_model or facts.cpu_model or facts.machine}, profile {chosen}; kept in {fleet_path()}")
    if facts.runtimes and facts.signers:
        return 0
    if provision is None and has_terminal():
        provision = click.confirm(
            f"Provision {name} now (a private Python environment with a runtime, and who may sign)?", err=True
        )
    if not provision:
        say(f"next:  edgevit target provision {name}")
        return 0
    return provision_targets([name])


@target.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Every target of the fleet file, and `local`."""
    from edgevit.fleet.inventory import load_fleet, select
    from edgevit.places import fleet_path

    targets = select(load_fleet(fleet_path()), ["*"])
    if as_json:
        emit_json("targets", {"targets": [t.model_dump(mode="json") for t in targets]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("target", "host", "profile", "tags"):
        table.add_column(title, overflow="fold")
    for t in targets:
        address = f"{t.user}@{t.host}" if t.user else t.host
        table.add_row(t.name, f"{address}:{t.port}" if t.port else address, t.profile or "by its facts", ", ".join(t.tags))
    out().print(table)


@target.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@json_option
def probe(targets: Sequence[str], as_json: bool) -> int:
    """What each target has today: board, Python, runtimes proven by an inference, memory, sensors, bundles.

    The inferences run now, unless a job is being measured there: then those remembered count.
    """
    from device_agents.wire import encode
    from edgevit.report.facts_view import render_facts

    def work(session: Session) -> tuple[Facts, str]:
        facts = session.agent.probe(anew=True)
        return facts, session.profile(facts).name

    done, failed = try_each_target(targets, work)
    code = show_failures(failed)
    if as_json:
        rows = [{"target": name, "profile": profile, "facts": encode(facts)} for name, (facts, profile) in done]
        emit_json("probe", {"targets": rows, "failed": json_failed(failed)})
        return code
    for name, (facts, profile) in done:
        out().print(render_facts(name, profile, facts))
    return code


@target.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@fingerprint_option
def trust(targets: Sequence[str], fingerprint: str | None) -> int:
    """Pin the host keys of TARGETs anew, after you know why they changed."""
    failed: list[tuple[str, EdgevitError]] = []
    for one in select_targets(targets):
        if one.is_local:
            say(f"{one.name}: is this machine, there is no host key to pin")
            continue
        try:
            say(f"{one.name}: {_pin_anew(one, fingerprint)}")
        except EdgevitError as error:
            failed.append((one.name, error))
    return show_failures(failed)


def _pin_anew(one: Target, fingerprint: str | None) -> str:
    """The fingerprint that was approved, kept in the audit log with those before."""
    from edgevit.fleet.audit import Action, recording
    from edgevit.fleet.connect import known_fingerprints
    from edgevit.fleet.connect import trust as pin
    from edgevit.transport.prompts import TerminalPrompts

    before = ", ".join(known_fingerprints(one))
    with recording(Action("target trust", {"before": before}), one) as record:
        approved = pin(one, TerminalPrompts(), fingerprint, replace=True)
        record.note(approved=approved)
    return approved


@target.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: Sequence[str]) -> None:
    """Forget targets here. On the device nothing changes: `edgevit target unprovision` comes first if it should."""
    from edgevit.fleet.audit import Action, recording
    from edgevit.fleet.inventory import load_fleet, remove_target
    from edgevit.places import fleet_path

    known = {t.name: t for t in load_fleet(fleet_path()).targets}
    for name in names:
        if name not in known:
            raise UnknownName("target", name, known, hint="edgevit target list")
    for name in dict.fromkeys(names):
        with recording(Action("target remove", {"host": known[name].host}), known[name]):
            remove_target(fleet_path(), name)
        if any(t.name == name for t in load_fleet(fleet_path()).targets):
            say(f"{name}: what was said of it alone is forgotten; it stays a target, as one of a range in {fleet_path()}")
        else:
            say(f"{name}: forgotten here")
