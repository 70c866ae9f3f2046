"""The agent's front door: ``main([agent_sha256, root, command, arguments…])`` → exit status.

0 after a ``result`` line, 10 after a ``refusal`` line. Anything else is a defect of the agent, and its traceback is on
standard error. Each command imports only what it needs: a start costs the compilation of every module it touches.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

EXIT_DONE = 0
EXIT_USAGE = 64
EXIT_REFUSED = 10
EXIT_HOST_GONE = 75


@dataclass(frozen=True)
class Start:
    """How this agent was started, to start others of its kind."""

    agent_sha256: str
    root: Path
    arguments: Tuple[str, ...]
    operator: str = ""

    def option(self, name: str) -> str:
        """The word after an option, empty where it was not given."""
        words = self.arguments[self.arguments.index(name) + 1 :] if name in self.arguments else ()
        return words[0] if words else ""


def _probe(start: Start, store: Any, console: Any) -> Any:
    import contextlib

    from device_agents.errors import Refused
    from device_agents.probe import collect_facts
    from device_agents.wire import encode

    anew = "--anew" in start.arguments
    if anew:
        # Loading runtimes beside what is being measured would falsify it: what is remembered of them has to do then.
        with contextlib.suppress(Refused):  # nothing is measured in a root that cannot be written
            anew = not store.has_server()
    with console.heartbeat():
        return encode(collect_facts(store, start.agent_sha256, "--quick" in start.arguments, lambda message: None, anew))


def _have(start: Start, store: Any, console: Any) -> Any:
    from device_agents.install import have

    return have(store, console)


def _install(start: Start, store: Any, console: Any) -> Any:
    from device_agents.install import install

    return install(store, console)


def _activate(start: Start, store: Any, console: Any) -> Any:
    from device_agents.activate import activate

    return activate(store, console, start.agent_sha256)


def _rollback(start: Start, store: Any, console: Any) -> Any:
    from device_agents.activate import rollback

    return rollback(store, console, start.agent_sha256, start.option("--undo"))


def _operator_take(start: Start, store: Any, console: Any) -> Any:
    from device_agents.operator_lock import take

    return take(store, console)


def _operator_release(start: Start, store: Any, console: Any) -> Any:
    from device_agents.operator_lock import release

    return release(store, start.operator)


def _active(start: Start, store: Any, console: Any) -> Any:
    from device_agents.api import describe_active

    return describe_active(store)


def _allow(start: Start, store: Any, console: Any) -> Any:
    from device_agents.activate import allow

    return allow(store, console)


def _signers(start: Start, store: Any, console: Any) -> Any:
    from device_agents.activate import read_signers

    return {"lines": read_signers(store)}


def _gc(start: Start, store: Any, console: Any) -> Any:
    from device_agents.garbage import collect_garbage

    return collect_garbage(store, console)


def _foresee(start: Start, store: Any, console: Any) -> Any:
    from device_agents.garbage import foresee_garbage

    return foresee_garbage(store, console)


def _uninstall(start: Start, store: Any, console: Any) -> Any:
    from device_agents.garbage import uninstall

    return uninstall(store, console)


def _submit(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import submit

    return submit(store, console, start.agent_sha256)


def _serve(start: Start, store: Any, console: Any) -> Any:
    import signal

    from device_agents.serve import serve_once

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)  # through every `finally`: the worker ends, a governor that was set is put back

    signal.signal(signal.SIGTERM, end)
    # No heartbeat: nobody waits for a server's words, which go into its log.
    return serve_once(store, start.agent_sha256, _lock_given(start))


def _lock_given(start: Start) -> Optional[int]:
    from device_agents.errors import Refused

    if "--lock" not in start.arguments:
        return None
    after = start.arguments[start.arguments.index("--lock") + 1 :]
    if not after or not after[0].isdigit():
        raise Refused("bad-request", "serve: --lock takes the number of an open descriptor")
    return int(after[0])


def _follow(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import follow

    return follow(store, console, start.agent_sha256, _run_id(start))


def _ack(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import acknowledge

    return acknowledge(store, _run_id(start))


def _cancel(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import cancel

    return cancel(store, start.agent_sha256, _run_id(start))


def _daemon_install(start: Start, store: Any, console: Any) -> Any:
    from device_agents.service import install_daemon

    return install_daemon(store, console, start.agent_sha256)


def _daemon_describe(start: Start, store: Any, console: Any) -> Any:
    from device_agents.service import describe_daemon

    describe_daemon(store, start.agent_sha256, start.arguments)


def _daemon_status(start: Start, store: Any, console: Any) -> Any:
    from device_agents.service import daemon_status

    return daemon_status(store)


def _daemon_logs(start: Start, store: Any, console: Any) -> Any:
    from device_agents.errors import Refused
    from device_agents.service import read_log

    if len(start.arguments) != 1 or not start.arguments[0].isdigit():
        raise Refused("bad-request", "daemon-logs: expected the number of lines")
    return read_log(store, min(int(start.arguments[0]), 10_000))


def _daemon_remove(start: Start, store: Any, console: Any) -> Any:
    from device_agents.service import remove_daemon

    return {"removed": remove_daemon(store)}


def _run_id(start: Start) -> str:
    from device_agents.errors import Refused

    if len(start.arguments) != 1:
        raise Refused("bad-request", "expected one run id, got {} arguments".format(len(start.arguments)))
    return start.arguments[0]


def _waiting(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import waiting

    return waiting(store)


def _resume(start: Start, store: Any, console: Any) -> Any:
    from device_agents.spool import resume

    return resume(store, start.agent_sha256)


def _predict(start: Start, store: Any, console: Any) -> Any:
    from device_agents.job import predict

    header = console.read_json("predict")
    payload = console.read_exactly(header.get("bytes") if isinstance(header, dict) else None, "predict")
    with console.heartbeat():
        return predict(store, start.agent_sha256, header, payload, lambda message: None)


def _provision(start: Start, store: Any, console: Any) -> Any:
    from device_agents.provision import provision

    return provision(store, console, start.agent_sha256)


def _unprovision(start: Start, store: Any, console: Any) -> Any:
    from device_agents.provision import unprovision

    return unprovision(store, console)


COMMANDS: Dict[str, Callable[[Start, Any, Any], Any]] = {
    "probe": _probe,
    "have": _have,
    "install": _install,
    "activate": _activate,
    "rollback": _rollback,
    "operator-take": _operator_take,
    "operator-release": _operator_release,
    "active": _active,
    "allow": _allow,
    "signers": _signers,
    "gc": _gc,
    "foresee-gc": _foresee,
    "uninstall": _uninstall,
    "submit": _submit,
    "serve": _serve,
    "follow": _follow,
    "ack": _ack,
    "cancel": _cancel,
    "daemon-describe": _daemon_describe,
    "daemon-install": _daemon_install,
    "daemon-status": _daemon_status,
    "daemon-logs": _daemon_logs,
    "daemon-remove": _daemon_remove,
    "waiting": _waiting,
    "resume": _resume,
    "predict": _predict,
    "provision": _provision,
    "unprovision": _unprovision,
}


CHANGING = ("install", "activate", "rollback", "gc", "uninstall", "unprovision")
"""Commands that look at the operators' lock; a test holds them against :mod:`device_agents.operator_lock`, which the others
need not import."""


def _run(command: Callable[[Start, Any, Any], Any], name: str, start: Start, store: Any, console: Any) -> Any:
    if name not in CHANGING or (not start.operator and not store.operator_path.exists()):
        return command(start, store, console)
    from device_agents.operator_lock import permitted

    with permitted(store, name, start.operator):
        return command(start, store, console)


def main(argv: List[str]) -> int:
    """Run one command. ``argv`` is (SHA-256 of this agent, root, command, arguments…); ``--operator TOKEN`` among the arguments
    says whose lock it works under."""
    if len(argv) < 3:
        sys.stderr.write("expected: agent-sha256 root command [arguments]\n")
        return EXIT_USAGE
    arguments, operator = list(argv[3:]), ""
    if "--operator" in arguments[:-1]:
        at = arguments.index("--operator")
        operator = arguments[at + 1]
        del arguments[at : at + 2]
    start = Start(argv[0], Path(argv[1]).expanduser(), tuple(arguments), operator)
    if argv[2] == "worker":
        from device_agents.worker import serve_request

        return int(serve_request())
    if argv[2] == "daemon":
        from device_agents.daemon import forget_launcher, run_daemon

        forget_launcher(argv)
        return run_daemon(start.root, start.agent_sha256, start.arguments)
    from device_agents.console import Console, HostGone
    from device_agents.errors import Refused
    from device_agents.store import Store
    from device_agents.wire import encode

    console = Console()
    try:
        try:
            command = COMMANDS.get(argv[2])
            if command is None:
                raise Refused(
                    "bad-request", "the agent has no command {!r}; it has {}".format(argv[2][:80], ", ".join(COMMANDS))
                )
            value = _run(command, argv[2], start, Store(start.root), console)
            if value is not None:  # a command that wrote its own last line returns None
                console.emit({"type": "result", "value": value})
        except Refused as e:
            console.emit({"type": "refusal", "refusal": encode(e.to_wire())})
            return EXIT_REFUSED
    except HostGone:
        return EXIT_HOST_GONE
    return EXIT_DONE
