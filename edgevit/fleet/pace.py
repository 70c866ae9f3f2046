"""How long a deployment will take, from what the audit log says of the last ones to the same target. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edgevit.fleet.audit import Entry

LEAST_BYTES = 1_000_000
"""Below this the start of the agent weighs more than the link."""

LAST = 5


@dataclass(frozen=True)
class Estimate:
    """``seconds`` that a deployment will take, or None with its reason in ``absent``; ``basis``: what that rests on."""

    seconds: float | None
    absent: str = ""
    basis: str = ""


def estimate(
    entries: Sequence[Entry], target: str, send_bytes: int, activates: bool, max_rate_mbit: float | None = None
) -> Estimate:
    """The bytes at the rate of the last uploads, or at ``max_rate_mbit`` where that is lower, and the rest (connecting,
    verifying, activating) as it took the last times.

    Medians of the last five each; deployments that lost their link do not count, uploads under 1 MB say nothing of a rate.
    """
    past = [e for e in entries if e.target == target and e.action == "deploy" and e.outcome == "done"]
    smooth = [e for e in past if "send_ms" in e.details and not e.details.get("links_lost")]
    alike = [e for e in smooth if bool(e.details.get("activated")) == activates][-LAST:]
    if not alike:
        what = "activated something" if activates else "left what is active as it is"
        return Estimate(None, f"no deployment there from here {what} yet")
    rest = statistics.median(max(0.0, e.seconds - int(e.details["send_ms"]) / 1e3) for e in alike)
    if not send_bytes:
        # The device verifies what it has also where nothing is sent.
        idle = [int(e.details["send_ms"]) / 1e3 for e in alike if not e.details.get("sent_bytes")]
        return Estimate(rest + (statistics.median(idle) if idle else 0.0), basis=f"the last {len(alike)} there")
    sent = [e for e in smooth if int(e.details.get("sent_bytes", 0)) >= LEAST_BYTES and int(e.details["send_ms"]) > 0][-LAST:]
    if not sent:
        return Estimate(None, f"nothing of {LEAST_BYTES // 10**6} MB or more was sent there from here yet")
    rate = statistics.median(int(e.details["sent_bytes"]) / int(e.details["send_ms"]) * 1e3 for e in sent)
    if max_rate_mbit is not None and max_rate_mbit * 1e6 / 8 < rate:
        rate = max_rate_mbit * 1e6 / 8
        return Estimate(rest + send_bytes / rate, basis=f"at most {max_rate_mbit:g} Mbit/s are to be sent")
    return Estimate(rest + send_bytes / rate, basis=f"{rate / 1e6:.1f} MB/s, the median of the last {len(sent)} uploads there")
