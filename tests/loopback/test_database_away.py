"""A database that goes away while a device measures: the result waits there, and comes home once the database is back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevit import bench
from edgevit.errors import StoreError
from edgevit.fleet.agent import Agent
from edgevit.progress import Quiet
from edgevit.results.store import Store
from edgevit.transport.local import LocalTransport
from tests.loopback.test_measure import device
from tests.support.agent_bundle import TinyBundle, make_job
from tests.support.postgres import PASSWORD, Postgres, running_postgres

__all__ = ["device"]  # a fixture of the other file


@pytest.fixture
def server() -> Iterator[Postgres]:
    with running_postgres() as made:
        yield made


def test_a_result_waits_on_the_device_while_the_database_is_away(
    device: tuple[Path, TinyBundle], server: Postgres, tmp_path: Path
) -> None:
    root, made = device

    class Measuring(Agent):
        """The server stops while the device is at work."""

        def follow(self, run_id: str, *told: object) -> object:  # type: ignore[override]
            server.stop()
            return super().follow(run_id, *told)  # type: ignore[arg-type]

    agent = Measuring(LocalTransport("local"), sys.executable, str(root))
    job = make_job(made, "run-1", made.variant())
    with Store(server.new_database()) as store:
        with pytest.raises(StoreError, match="adding run run-1") as caught:
            bench.measure(agent, job, store, Quiet())
        assert "edgevit collect local" in caught.value.hint and PASSWORD not in str(caught.value)
        assert [(w.run_id, w.state) for w in agent.waiting()] == [("run-1", "done")], "never acknowledged"
        server.start()
        plain = Agent(LocalTransport("local"), sys.executable, str(root))
        (home,) = bench.bring_home(plain, store, Quiet(), wait=False)
        assert home.newly_stored and store.runs() == [home.run] and plain.waiting() == ()
