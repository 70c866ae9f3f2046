"""Looking at a fleet: reach every target at once, each for a bounded time, and say what is wrong and what to type next."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.errors import (
    DeviceError,
    EdgevitError,
    HostKeyError,
    LoginError,
    LostLink,
    NotProvisioned,
    Unreachable,
    UsageError,
)
from edgevit.fleet.agent import Agent
from edgevit.fleet.connect import connect
from edgevit.fleet.conversation import END_S, SILENCE_S, check_start
from edgevit.fleet.inventory import Target, pin_of
from edgevit.fleet.refusals import HINTS
from edgevit.profile import Finding, check_target_profile, load_profile, propose_profile
from edgevit.schedule import AT_ONCE, device_of, over_targets
from edgevit.transport.prompts import Prompts, TerminalPrompts

if TYPE_CHECKING:
    from device_agents.wire import DaemonStatus, Facts

LOW_DISK_MB = 500
SKEW_S = 2.0
"""Beyond this, times in results and logs of the device can no longer be set beside the host's."""

UNTOLD = ("no-space", "io-error", "no-ssh-keygen", "no-signers")
"""What keeps a device from verifying anything, and says nothing of what is active there."""

EXCHANGES = 5
CLOCK = "import sys, time\nfor line in sys.stdin:\n    print(repr(time.time()))\n    sys.stdout.flush()\n"
"""A device's clock, read once for each line that it is sent."""

STATES: tuple[tuple[type[EdgevitError], str], ...] = (
    (HostKeyError, "host key"),
    (LoginError, "no login"),
    (LostLink, "link lost"),
    (NotProvisioned, "no Python"),
    (Unreachable, "unreachable"),
    (UsageError, "bad entry"),
    (DeviceError, "refused"),
)


class NoNewKeys(TerminalPrompts):
    """Asks for passwords as every command does, and approves no host key: whoever looks changes nothing."""

    def trust_host_key(self, question: str) -> bool | None:
        return None


@dataclass(frozen=True)
class Exchange:
    """One question for a device's clock. Seconds since 1970: ``sent`` and ``received`` by the host's clock."""

    sent: float
    device: float
    received: float


@dataclass(frozen=True)
class Skew:
    """How far a device's clock is ahead of the host's, in seconds, and by how much that may be wrong."""

    seconds: float
    uncertainty: float

    @property
    def certain(self) -> float:
        """The part of it that the round trip does not explain, in seconds, never negative."""
        return max(0.0, abs(self.seconds) - self.uncertainty)


@dataclass(frozen=True)
class Seen:
    """What a target answered. ``sent_agent``: it lacked this host's agent and has it now; ``proved``: each runtime was asked
    for an inference now, else those proven before count."""

    facts: Facts
    daemon: DaemonStatus
    clock: Skew
    sent_agent: bool
    proved: bool


@dataclass(frozen=True)
class Checked:
    """One target: ``seen``, or the ``error`` that kept it from being looked at; ``seconds``: how long that took."""

    target: Target
    seen: Seen | None
    error: EdgevitError | None
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def state(self) -> str:
        """One word or two: ok, warning, error, or what kept it from being reached."""
        if self.error is not None:
            return next(word for kind, word in STATES if isinstance(self.error, kind))
        severities = {finding.severity for finding in self.findings}
        return next((s for s in ("error", "warning") if s in severities), "ok")


def estimate_skew(exchanges: Sequence[Exchange]) -> Skew:
    """The exchange with the shortest round trip tells most: its middle ± half of it (Cristian, "Probabilistic clock
    synchronization", 1989). ValueError where there is none."""
    best = min(exchanges, key=lambda e: e.received - e.sent)
    return Skew(best.device - (best.sent + best.received) / 2, (best.received - best.sent) / 2)


def measure_clock(agent: Agent, exchanges: int = EXCHANGES) -> Skew:
    """Ask the device for its clock several times over one connection. Raises what the link raises, NotProvisioned without a
    Python."""
    # Steps of the host's own clock in between must not count.
    base = time.time() - time.monotonic()
    found = []
    channel = agent.transport.open([agent.python, "-c", CLOCK])
    try:
        for _ in range(exchanges):
            sent = base + time.monotonic()
            channel.write(b"\n")
            line = channel.read_line(SILENCE_S)
            found.append(Exchange(sent, _seconds(agent, line), base + time.monotonic()))
        channel.close_input()
        check_start(agent.name, channel.wait(END_S), b"", channel.error_text())
    finally:
        channel.close()
    return estimate_skew(found)


def _seconds(agent: Agent, line: bytes) -> float:
    try:
        value = float(line)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DeviceError(
            f"{agent.name}: asked for its clock, it answered {line[:80]!r}", hint=f"edgevit target probe {agent.name}"
        )
    return value


def look(target: Target, prompts: Prompts, *, prove: bool, limit_s: float) -> Seen:
    """Connect and ask. After the login all of it may take ``limit_s`` seconds; connecting has time-outs of its own.

    Without ``prove`` runtimes count that were proven before, so that nothing is loaded beside what the device measures.
    """
    with connect(target, prompts) as agent, _bounded(agent, limit_s):
        facts = agent.probe(quick=not prove, anew=prove)
        return Seen(facts, agent.daemon_status(), measure_clock(agent), agent.sent_agent, prove)


def probe_bounded(target: Target, prompts: Prompts, limit_s: float) -> Facts:
    """Connect, and the facts without loading a runtime; bounded like :func:`look`."""
    with connect(target, prompts) as agent, _bounded(agent, limit_s):
        return agent.probe(quick=True)


@contextmanager
def _bounded(agent: Agent, limit_s: float) -> Iterator[None]:
    """Close the link once the time is up, which ends whatever waits for it."""
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        agent.close()

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except DeviceError as error:
        if not expired.is_set():
            raise
        raise Unreachable(
            f"{agent.name}: it was reached, but had not answered everything after {limit_s:g} s",
            hint=f"edgevit fleet check {agent.name} --timeout {4 * limit_s:g}",
        ) from error
    finally:
        timer.cancel()


def check_targets(
    targets: Sequence[Target],
    prompts: Prompts,
    host_agent: str,
    *,
    prove: bool,
    limit_s: float,
    on_done: Callable[[Checked], None],
    at_once: int = AT_ONCE,
) -> list[Checked]:
    """Every target, in the given order, at most ``at_once`` together; ``host_agent`` is the SHA-256 of this host's agent.
    ``on_done`` is called from threads."""
    by_name = {target.name: target for target in targets}

    def one(name: str) -> Checked:
        target, started = by_name[name], time.monotonic()
        seen: Seen | None = None
        error: EdgevitError | None = None
        findings: tuple[Finding, ...] = ()
        try:
            seen = look(target, prompts, prove=prove, limit_s=limit_s)
            findings = judge(target, seen, host_agent)
        except EdgevitError as e:
            error = e
        checked = Checked(target, seen, error, findings, time.monotonic() - started)
        on_done(checked)
        return checked

    done, _ = over_targets(list(by_name), one, at_once=at_once, device=lambda name: device_of(by_name[name]))
    return [checked for _, checked in done]


# --------------------------------------------------------------------------------------------------------------------
# What is wrong with what was seen; pure
# --------------------------------------------------------------------------------------------------------------------


def judge(target: Target, seen: Seen, host_agent: str) -> tuple[Finding, ...]:
    """What is wrong, errors first. An error: a deployment to this target would be refused."""
    found = [
        *_judge_board(target, seen.facts),
        *_judge_readiness(target.name, seen.facts, seen.proved),
        *_judge_active(target.name, seen.facts),
        *_judge_clock(target.name, seen.clock),
        *_judge_daemon(target.name, seen.daemon, host_agent),
        *_judge_waiting(target.name, seen.daemon),
        *judge_pin(target, seen.facts),
    ]
    return tuple(sorted(found, key=lambda finding: finding.severity != "error"))


def _judge_board(target: Target, facts: Facts) -> list[Finding]:
    name = target.profile or propose_profile(facts)
    if name is None:
        board = facts.board_model or facts.hostname
        hint = "edgevit profiles; then write `profile: NAME` for it in the fleet file"
        return [Finding("error", f"no profile fits a {facts.machine} board called {board!r}", hint)]
    return [
        Finding(f.severity, f"{name}: {f.message}", f.hint and f"edgevit target add {target.name} … {f.hint}")
        if f.hint.startswith("--")
        else Finding(f.severity, f"{name}: {f.message}", f.hint)
        for f in check_target_profile(load_profile(name), facts)
    ]


def _judge_readiness(name: str, facts: Facts, proved: bool) -> list[Finding]:
    found = []
    if facts.ssh_keygen is None:
        why = facts.absent.get("ssh_keygen", "it has no ssh-keygen -Y")
        found.append(Finding("error", f"{why}; no signature can be verified there", "sudo apt install openssh-client, there"))
    if not proven_runtimes(facts):
        provision = f"edgevit target provision {name}"
        # One that came another way than by provisioning may just never have been asked for an inference.
        hint = provision if proved else f"{provision}, or where there is one already: edgevit fleet check {name} --prove"
        found.append(Finding("error", "no runtime was proven there", hint))
    if not facts.signers:
        found.append(Finding("error", "nobody may sign for it", f"edgevit key allow {name}"))
    if facts.disk_free_mb < LOW_DISK_MB:
        found.append(Finding("warning", f"{facts.disk_free_mb:,} MB are free on its disk", f"ssh to {name}, then df -h"))
    return found


def _judge_active(name: str, facts: Facts) -> list[Finding]:
    """What is active stays active whatever happens to its signer; that it would not be taken today is said."""
    if facts.active is None or not facts.active_refused:
        return []
    what = f"{facts.active.bundle_name} version {facts.active.bundle_version} is active"
    if facts.active_refused.startswith("unknown-signer"):
        message = f"{what}, signed by a key that may not sign for it any more; it stays until another is deployed"
        return [Finding("warning", message, f"edgevit deploy BUNDLE {name} with a bundle of an allowed signer")]
    code = facts.active_refused.partition(":")[0]
    if code in UNTOLD:
        message = f"{what}; whether it still verifies cannot be told: {facts.active_refused}"
        return [Finding("error", message, HINTS[code].format(name=name))]
    return [Finding("error", f"{what} and does not verify any more: {facts.active_refused}", f"edgevit deploy BUNDLE {name}")]


def proven_runtimes(facts: Facts) -> tuple[str, ...]:
    """``onnxruntime 1.20.1`` for each runtime with a provider that passed an inference."""
    return tuple(f"{r.runtime} {r.version}" for r in facts.runtimes if any(p.proven for p in r.providers))


def _judge_clock(name: str, clock: Skew) -> list[Finding]:
    if clock.certain <= SKEW_S:
        return []
    way = "ahead of" if clock.seconds > 0 else "behind"
    message = f"its clock is {abs(clock.seconds):,.1f} s {way} this machine's (± {clock.uncertainty:.1f} s)"
    return [Finding("warning", message, f"ssh to {name}, then sudo timedatectl set-ntp true")]


def _judge_daemon(name: str, daemon: DaemonStatus, host_agent: str) -> list[Finding]:
    if daemon.kind and not daemon.at_work:
        message = f"its daemon is installed and not at work: {daemon.unit_state}"
        return [Finding("warning", message, f"edgevit target daemon logs {name}")]
    if daemon.at_work and daemon.state is not None and daemon.state.agent_sha256 != host_agent:
        return [Finding("warning", "its daemon runs another agent than this host's", f"edgevit target daemon install {name}")]
    return []


def judge_pin(target: Target, facts: Facts) -> list[Finding]:
    """A warning where something else is active than the fleet file pins the target to."""
    if target.pin is None or facts.active is None:
        return []
    active = pin_of(facts.active.bundle_name, facts.active.bundle_version)
    if active == target.pin:
        return []
    message = f"{active} is active, the fleet file pins it to {target.pin}"
    return [Finding("warning", message, f"edgevit deploy BUNDLE {target.name} --allow-older, with that bundle")]


def _judge_waiting(name: str, daemon: DaemonStatus) -> list[Finding]:
    if not daemon.spooled:
        return []
    count = len(daemon.spooled)
    what = "1 result waits" if count == 1 else f"{count} results wait"
    return [Finding("warning", f"{what} there", f"edgevit collect {name}")]
