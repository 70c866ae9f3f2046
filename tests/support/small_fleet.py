"""Several real devices for tests of deployments: one sshd each, a root and a runtime of its own, a key that may sign."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgevit import signing
from edgevit.fleet.connect import connect, trust
from edgevit.fleet.inventory import Target, add_target
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.places import config_dir, fleet_path
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import Signer
from tests.support.processes import find_agents, kill
from tests.support.sshd import Account, lend_runtime, running_sshd, target_of


@dataclass(frozen=True)
class SmallFleet:
    """``targets`` stand in the fleet file of the present EDGEVIT_HOME, whose key may sign for them."""

    targets: tuple[Target, ...]
    servers: tuple[LoopbackSshd, ...]
    signer: Signer

    @property
    def names(self) -> list[str]:
        return [t.name for t in self.targets]

    def root(self, name: str) -> Path:
        return next(Path(t.root) for t in self.targets if t.name == name)

    def kill_agents(self) -> None:
        """End everything that works on these devices, as a power cut would."""
        kill(find_agents(*(t.root for t in self.targets)))

    def clear(self) -> None:
        """End everything that works on these devices, and leave them as they were provisioned: nothing was ever deployed."""
        self.kill_agents()
        for target in self.targets:
            root = Path(target.root)
            for name in ("active.json", "operator.json"):
                (root / name).unlink(missing_ok=True)
            for name in ("blobs", "bundles", "queue", "spool", "accuracy"):
                if (root / name).exists():
                    shutil.rmtree(root / name)


@contextlib.contextmanager
def small_fleet(account: Account, count: int) -> Iterator[SmallFleet]:
    """``box-1`` to ``box-N``. RuntimeError where the account can run no model."""
    key = config_dir() / "signing_key"
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        signing.make_key(key, "fleet")
    line = signing.allowed_signers_line("tester@here", signing.public_line(key))
    with contextlib.ExitStack() as stack:
        servers, targets = [], []
        for number in range(1, count + 1):
            server = stack.enter_context(running_sshd(account))
            root = account.home / f"agent-{number}"
            target = target_of(server, account, f"box-{number}", root=str(root))
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            trust(target, NoPrompts(), server.fingerprint)
            with connect(target, NoPrompts()) as agent:
                agent.allow([line])
            _give_runtime(account, root, targets)
            add_target(fleet_path(), target)
            servers.append(server)
            targets.append(target)
        yield SmallFleet(tuple(targets), tuple(servers), Signer(key))


def _give_runtime(account: Account, root: Path, there: list[Target]) -> None:
    if there:  # the same environment again costs a copy instead of a second
        subprocess.run(["cp", "-a", f"{there[0].root}/venv", str(root / "venv")], check=True)
        return
    problem = lend_runtime(account, root)
    if problem:
        raise RuntimeError(problem)
