"""A host measures through a real agent whose link breaks at the worst moments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edgevit import bench
from edgevit.bundle import open_bundle
from edgevit.errors import DeviceRefused, LostLink
from edgevit.fleet.agent import Agent
from edgevit.progress import Quiet
from edgevit.results.store import Store
from edgevit.transport.base import Channel
from edgevit.transport.local import LocalTransport
from tests.support.agent_bundle import TinyBundle, make_bundle, make_job, make_signer


class Cut(LocalTransport):
    """A link that breaks whenever ``cut`` says so of a command, after the agent did it and before its answer arrives."""

    def __init__(self, cut: Callable[[str], bool]) -> None:
        super().__init__("local")
        self._cut = cut

    def open(self, argv: Sequence[str]) -> Channel:
        channel = super().open(argv)
        if self._cut(argv[5] if len(argv) > 5 else ""):
            channel.close_input()
            while channel.read_line(60):
                pass
            channel.wait(60)
            raise LostLink("local: the link was cut")
        return channel


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path / 'results.sqlite'}") as opened:
        yield opened


@pytest.fixture
def device(tmp_path: Path) -> tuple[Path, TinyBundle]:
    """An agent's root that knows the signer and holds the bundle."""
    signer = make_signer(tmp_path / "keys")
    made = make_bundle(signer)
    agent = agent_at(tmp_path / "root", lambda command: False)
    agent.allow([signer.line()])
    agent.install(open_bundle(made.write(tmp_path / "bundle"), None))
    return tmp_path / "root", made


def agent_at(root: Path, cut: Callable[[str], bool]) -> Agent:
    return Agent(Cut(cut), sys.executable, str(root))


def test_an_acknowledgement_whose_answer_is_lost_loses_no_result(device: tuple[Path, TinyBundle], store: Store) -> None:
    """The device has acknowledged, the host does not know: it must not ask for the run again, which is gone there."""
    root, made = device
    acks: list[str] = []

    def cut(command: str) -> bool:
        acks.extend([command] if command == "ack" else [])
        return command == "ack" and len(acks) == 1

    def reconnect() -> Agent:
        acks.append("link")
        if acks.count("link") == 1:
            raise LostLink("local: cut again while logging in")
        return agent_at(root, cut)

    job = make_job(made, "run-1", made.variant())
    measured = bench.measure(agent_at(root, cut), job, store, Quiet(), reconnect)
    assert measured.newly_stored and measured.run.job == job
    assert acks == ["ack", "link", "ack"], "no answer was read twice"
    assert store.runs() == [measured.run]
    assert agent_at(root, cut).waiting() == ()


def test_a_run_that_somebody_else_brought_home_stops_nothing(device: tuple[Path, TinyBundle], store: Store) -> None:
    root, made = device
    agent = agent_at(root, lambda command: False)
    for name in ("run-1", "run-2"):
        agent.submit(make_job(made, name, made.variant()))
        agent.follow(name)

    class Raced(Agent):
        """Another host acknowledges the first run just after this one asked what waits."""

        def waiting(self) -> tuple[object, ...]:  # type: ignore[override]
            found = super().waiting()
            super().ack("run-1")
            return found

    raced = Raced(LocalTransport("local"), sys.executable, str(root))
    assert [m.run.job.run_id for m in bench.bring_home(raced, store, Quiet(), wait=False)] == ["run-2"]
    assert [run.job.run_id for run in store.runs()] == ["run-2"] and agent.waiting() == ()


def test_a_run_that_collect_brought_home_meanwhile_is_taken_from_the_store(
    device: tuple[Path, TinyBundle], store: Store
) -> None:
    """The job was submitted and put off for other devices; `edgevit collect` on this machine was there first."""
    root, made = device
    agent = agent_at(root, lambda command: False)
    job = make_job(made, "run-1", made.variant())
    agent.submit(job)
    (home,) = bench.bring_home(agent, store, Quiet(), wait=True)
    measured = bench.measure(agent, job, store, Quiet(), submitted=True)
    assert measured.run == home.run and not measured.newly_stored
    with Store("sqlite:///:memory:") as other, pytest.raises(DeviceRefused, match="no-such-run"):
        bench.measure(agent, job, other, Quiet(), submitted=True)


@pytest.mark.parametrize(("command", "said"), [("submit", "is not known"), ("follow", "its result waits on the device")])
def test_a_link_that_stays_lost_says_what_is_known_of_the_run(
    device: tuple[Path, TinyBundle], store: Store, command: str, said: str
) -> None:
    root, made = device
    agent = agent_at(root, lambda one: False)
    lost = LostLink("box: the link was cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LostLink, match=said):
        patch.setattr(agent, command, lambda *_: (_ for _ in ()).throw(lost))
        bench.measure(agent, make_job(made, "run-1", made.variant()), store, Quiet())
