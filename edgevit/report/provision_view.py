"""What provisioning would do to a device, or did, for people (within 100 columns) and as JSON values."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.fleet.check import proven_runtimes

if TYPE_CHECKING:
    from device_agents.wire import Facts
    from edgevit.fleet.agent import Provisioned
    from edgevit.fleet.provision import Prepared


def render_provision(name: str, prepared: Prepared, facts: Facts, done: Provisioned | None) -> RenderableType:
    """A dry run where ``done`` is None: every wheel, its size, and whether it is there. Else one line of what is there now."""
    lines: list[RenderableType] = []
    if done is None:
        lines.append(Text.assemble((name, "bold"), f"  {prepared.platform}"))
        lines += _wheels(prepared)
        if not prepared.signs:
            lines.append(Text("your key would be allowed to sign for it", style="dim"))
    else:
        runtimes = ", ".join(proven_runtimes(facts))
        signers = f"{facts.signers} signer{'s' if facts.signers != 1 else ''}"
        what = f"{done.received_bytes / 1e6:.1f} MB sent" if done.made else "nothing to do"
        lines.append(Text.assemble((name, "bold"), f": {runtimes}; Python {facts.runtime_python}; {signers}; {what}"))
        lines += [
            Text(f"does not work there: {name}: {why}", style="yellow") for name, why in _failing(prepared, facts).items()
        ]
    lines += [Text(f"left out: {reason}", style="yellow") for reason in prepared.plan.without]
    return Group(*lines)


def _failing(prepared: Prepared, facts: Facts) -> dict[str, str]:
    """The runtimes that were to be there and passed no inference, with why: another one did, so provisioning went on."""
    proven = {r.runtime for r in facts.runtimes if any(p.proven for p in r.providers)}
    details = {r.runtime: "; ".join(f"{p.name}: {p.detail}" for p in r.providers) for r in facts.runtimes}
    lacking = [runtime for runtime in prepared.plan.runtimes if runtime not in proven]
    return {name: details.get(name) or facts.absent.get(name) or "it was not found" for name in lacking}


def _wheels(prepared: Prepared) -> list[RenderableType]:
    house, request = prepared.house, prepared.request
    if house is None or request is None:
        return [Text("nothing to do: the environment asked for is there and works")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("package")
    table.add_column("version")
    table.add_column("MB", justify="right")
    table.add_column("")
    for wheel in house.wheels:
        state = "to send" if wheel.sha256 in prepared.missing else "there"
        table.add_row(wheel.package, str(wheel.version), f"{wheel.size / 1e6:.1f}", state)
    lines: list[RenderableType] = [table]
    if house.remembered is not None:
        resolved = time.strftime("%Y-%m-%d %H:%M", time.localtime(house.remembered))
        lines.append(Text(f"as resolved on {resolved}; --upgrade asks the index again", style="dim"))
    there = house.size - prepared.send_bytes
    lines.append(
        Text(
            f"{len(house.wheels)} wheels, {prepared.send_bytes / 1e6:.1f} MB to send, {there / 1e6:.1f} MB there; "
            f"{request.unpacked_bytes / 1e6:.1f} MB more once installed; {prepared.free_bytes / 1e6:,.0f} MB free"
        )
    )
    if prepared.plan.keep:
        given = ", ".join(f"{package} {version}" for package, version in prepared.plan.given) or "its packages"
        lines.append(Text(f"of the board's own system: {', '.join(prepared.plan.keep)}, with {given}"))
    return lines


def as_values(prepared: Prepared, facts: Facts, done: Provisioned | None) -> dict[str, Any]:
    """The same as JSON values; ``wheels`` is empty where nothing is to be done."""
    house = prepared.house
    wheels = [
        {
            "package": w.package,
            "version": str(w.version),
            "bytes": w.size,
            "sha256": w.sha256,
            "there": w.sha256 not in prepared.missing,
        }
        for w in (house.wheels if house else ())
    ]
    return {
        "platform": str(prepared.platform),
        "requirements": list(prepared.plan.requirements),
        "up_to_date": house is None,
        "wheels": wheels,
        "send_bytes": prepared.send_bytes,
        "unpacked_bytes": prepared.request.unpacked_bytes if prepared.request else 0,
        "free_bytes": prepared.free_bytes,
        "keep": list(prepared.plan.keep),
        "without": list(prepared.plan.without),
        "failing": {} if done is None else _failing(prepared, facts),
        "made": None if done is None else done.made,
        "sent_bytes": None if done is None else done.received_bytes,
        "runtimes": [
            {"runtime": r.runtime, "version": r.version} for r in facts.runtimes if any(p.proven for p in r.providers)
        ],
    }
