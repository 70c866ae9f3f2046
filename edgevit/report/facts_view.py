"""What a box has, as a table for people, within 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from device_agents.wire import DaemonStatus, Facts


def render_facts(name: str, profile: str, facts: Facts) -> RenderableType:
    """Everything the agent found; what could not be read is named with its reason."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("board", facts.board_model or "–")
    table.add_row("system", f"{facts.os_name or '–'}, kernel {facts.kernel}, {facts.libc or '–'}")
    table.add_row("cpu", f"{facts.cpu_count} × {facts.cpu_model or facts.machine}")
    if facts.jetpack:
        table.add_row("JetPack", facts.jetpack)
    memory = f"{facts.memory_mb:,} MB" if facts.memory_mb is not None else "–"
    table.add_row("memory", f"{memory}, {facts.disk_free_mb:,} MB free on disk")
    table.add_row("Python", f"{facts.python}; runtimes in {facts.runtime_python or '–'}, numpy {facts.numpy or '–'}")
    for runtime in facts.runtimes:
        providers = ", ".join(
            p.name
            + (" (proven)" if p.proven else f" (not proven: {p.detail.splitlines()[-1] if p.detail else 'no inference'})")
            for p in runtime.providers
        )
        table.add_row("runtime", f"{runtime.runtime} {runtime.version}: {providers}")
    if not facts.runtimes:
        table.add_row("runtime", f"none; next: edgevit target provision {name}")
    if facts.environment:
        packages = [" ".join(w.name.split("-")[:2]) for w in facts.environment.wheels if not w.is_pip]
        table.add_row("provisioned", ", ".join(packages) or "an environment without packages")
    table.add_row("sensors", ", ".join(facts.sensors) or "none")
    table.add_row("signers", str(facts.signers))
    if facts.active:
        active = facts.active
        table.add_row("active", f"{active.bundle_name} version {active.bundle_version}: {active.variant.artifact}")
    else:
        table.add_row("active", "nothing")
    if facts.waiting_runs:
        count = f"{len(facts.waiting_runs)} run{'s' if len(facts.waiting_runs) != 1 else ''}"
        table.add_row("waiting", f"{count}, measured or to be; next: edgevit collect {name}")
    table.add_row("agent", f"version {facts.agent_version}, {facts.agent_sha256[:16]}")
    for what, reason in sorted(facts.absent.items()):
        table.add_row(f"no {what}", reason)
    return Group(Text.assemble((name, "bold"), f"  {facts.hostname}, profile {profile}"), table)


def render_daemon(name: str, status: DaemonStatus) -> RenderableType:
    """A daemon now; protections that do not hold stand out."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    state = status.state
    if status.at_work and state is not None:
        table.add_row("at work", f"since {state.started_at}, as {state.user}, process {state.pid}")
        if status.resident_mb is not None and status.cpu_seconds is not None:
            table.add_row("takes", f"{status.resident_mb:.1f} MB resident, {status.cpu_seconds:.2f} s of CPU since it started")
    elif status.at_work:
        table.add_row("at work", "yes; it does not say yet what it runs under")
    else:
        step = "logs" if status.kind else "install"
        table.add_row("at work", f"no; next: edgevit target daemon {step} {name}")
    kind = f"{status.kind} unit {status.unit}: " if status.kind else ""
    table.add_row("systemd", kind + status.unit_state)
    table.add_row("queue", f"{len(status.queued)} jobs wait")
    collect = f"; next: edgevit collect {name}" if status.spooled else ""
    table.add_row("spool", f"{len(status.spooled)} results wait{collect}")
    quota = f" of a quota of {state.quota_mb:,} MB" if state is not None and state.quota_mb is not None else ", no quota"
    table.add_row("disk", f"{status.used_mb:,} MB{quota}")
    if status.at_work and state is not None:
        for what, held in state.protections.items():
            table.add_row(what, Text(held, style="" if held == "yes" or what == "groups" else "yellow"))
    return Group(Text.assemble((name, "bold"), "  daemon"), table)
