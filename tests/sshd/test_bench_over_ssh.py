"""The main job over a real sshd under an ordinary account, whole and over cut links."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgevit.bundle import Bundle, open_bundle
from edgevit.errors import LostLink, NotProvisioned
from edgevit.fleet.agent import Agent
from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import Target
from edgevit.loopback_sshd import LoopbackSshd
from edgevit.progress import Quiet
from edgevit.transport.prompts import NoPrompts
from tests.support import agent_bundle as tiny
from tests.support.sshd import Account, lend_runtime


@pytest.fixture
def shipped(box: Target, account: Account, tmp_path: Path) -> tuple[tiny.TinyBundle, Bundle]:
    """A tiny real bundle; the device knows its signer and has a runtime."""
    signer = tiny.make_signer(tmp_path / "keys")
    made = tiny.make_bundle(signer)
    with connect(box, NoPrompts()) as agent:
        agent.allow([signer.line()])
    problem = lend_runtime(account, Path(box.root))
    if problem:
        pytest.skip(problem)
    return made, open_bundle(made.write(tmp_path / "bundle"), None)


def run_job(agent: Agent, made: tiny.TinyBundle, bundle: Bundle, run_id: str) -> None:
    agent.install(bundle)
    assert agent.submit(tiny.make_job(made, run_id, made.variant()))


def test_a_run_comes_home_once_and_waits_until_it_is_acknowledged(box: Target, shipped: tuple[tiny.TinyBundle, Bundle]) -> None:
    made, bundle = shipped
    with connect(box, NoPrompts()) as agent:
        agent.install(bundle)
        assert agent.activate(made.variant(), "test").active.variant == made.variant()
        job = tiny.make_job(made, "run-1", made.variant())
        assert agent.submit(job)
        assert not agent.submit(job)
        run = agent.follow("run-1", Quiet())
        assert run.status == "completed", run.reason
        assert run.job == job
        assert len(run.measurements[0].series[0].samples_ns) >= 8
        assert run.measurements[0].series[0].golden.passed
        assert [(w.run_id, w.state) for w in agent.waiting()] == [("run-1", "done")]
        assert agent.follow("run-1", Quiet()) == run
        assert agent.ack("run-1")
        assert not agent.ack("run-1")
        assert agent.waiting() == ()
        assert not agent.submit(job)


def test_a_link_cut_while_following_loses_nothing(
    box: Target, server: LoopbackSshd, shipped: tuple[tiny.TinyBundle, Bundle]
) -> None:
    made, bundle = shipped
    with connect(box, NoPrompts()) as agent:
        run_job(agent, made, bundle, "run-2")

        class Cut(Quiet):
            cut = 0.0

            def advance(self, key: str, done: float, text: str = "") -> None:
                if not self.cut and server.kill_connections():
                    self.cut = time.monotonic()

        cut = Cut()
        with pytest.raises(LostLink):
            agent.follow("run-2", cut)
        assert time.monotonic() - cut.cut < 10
        again = agent.reopen()
        run = again.follow("run-2", Quiet())
        assert run.status == "completed", run.reason
        assert run.attempt == 1
        assert again.ack("run-2")
        again.close()


def test_images_are_classified_on_the_device(box: Target, shipped: tuple[tiny.TinyBundle, Bundle]) -> None:
    made, bundle = shipped
    with connect(box, NoPrompts()) as agent:
        agent.install(bundle)
        agent.activate(made.variant(), "test")
        images = tiny.tiny_images(3)
        expected = tiny.outputs_onnx(tiny.tiny_onnx(), images).argmax(axis=1)
        found = agent.predict(images, made.variant())
        assert [five[0]["index"] for five in found] == list(expected)


def test_without_a_runtime_the_command_that_brings_one_is_named(box: Target, account: Account, tmp_path: Path) -> None:
    if not account.ordinary:
        pytest.skip("the Python of whoever runs the tests has a runtime")
    signer = tiny.make_signer(tmp_path / "keys")
    made = tiny.make_bundle(signer)
    bundle = open_bundle(made.write(tmp_path / "bundle"), None)
    with connect(box, NoPrompts()) as agent:
        agent.allow([signer.line()])
        agent.install(bundle)
        facts = agent.probe()
        assert facts.runtimes == ()
        from edgevit.fleet.deploy import choose_default_variant
        from edgevit.profile import load_profile

        profile = load_profile(bundle.manifest.artifacts[0].fits[0])
        with pytest.raises(NotProvisioned) as caught:
            choose_default_variant(bundle, "box", facts, profile)
        assert caught.value.hint == "edgevit target provision box"
