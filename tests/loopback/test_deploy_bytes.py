"""What the commands say and keep to about bytes: the plan counts chunks as they are then sent; a rate reaches the upload."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from edgevit.errors import LostLink
from edgevit.fleet import retry, upload
from edgevit.fleet.agent import Agent
from edgevit.fleet.audit import read_log
from edgevit.places import audit_path
from edgevit.plans import PLANS
from tests.support.agent_bundle import FAST_PLAN, Signer, make_bundle
from tests.support.cli import Cli

WEIGHTS = random.Random(1).randbytes(2_000_000)
CHANGED = WEIGHTS[:1_000_000] + random.Random(2).randbytes(20_000) + WEIGHTS[1_020_000:]


def bundle_of(folder: Path, signer: Signer, weights: bytes, version: int) -> Path:
    names = json.dumps(["x"]).encode() + weights
    return make_bundle(signer, version=version, extra_blob=names, chunk_index=lambda index: index).write(folder / f"v{version}")


def deployed(cli: Cli, *options: object) -> dict[str, Any]:
    said = cli("deploy", *options, "--json")
    assert said.code == 0, said.err
    (found,) = json.loads(said.out)["targets"]
    return dict(found)


def test_a_plan_counts_the_chunks_that_are_then_sent(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    first, second = bundle_of(tmp_path, operator, WEIGHTS, 1), bundle_of(tmp_path, operator, CHANGED, 2)
    assert deployed(cli, first, "local")["sent_bytes"] > len(WEIGHTS)
    planned = deployed(cli, second, "local", "--dry-run")["send_bytes"]
    assert planned == deployed(cli, second, "local")["sent_bytes"] < 20_000 + 300_000


@pytest.mark.parametrize("command", [("deploy",), ("bench", "--plan", "quick", "--threads", "1")])
def test_the_rate_that_is_asked_for_reaches_the_upload(
    cli: Cli,
    operator: Signer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    rates: list[float | None] = []

    class Recorded(upload.Throttle):
        def __init__(self, mbit: float | None) -> None:
            rates.append(mbit)
            super().__init__(mbit, sleep=lambda _: None)

    monkeypatch.setattr(upload, "Throttle", Recorded)
    monkeypatch.setitem(PLANS, "quick", FAST_PLAN)
    made = bundle_of(tmp_path, operator, WEIGHTS, 1)
    said = cli(command[0], made, "local", *command[1:], "--max-rate", "40")
    assert said.code == 0, said.err
    assert rates and set(rates) == {40.0}


def test_a_rate_that_nobody_would_keep_to_is_refused(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    made = bundle_of(tmp_path, operator, b"w", 1)
    cli("bench", made, "local", "--detach", "--max-rate", "5").refused(2, "--max-rate", "edgevit deploy")
    for wrong in ("0", "-1", "nan", "fast"):
        assert cli("deploy", made, "local", "--max-rate", wrong).code == 2


def test_what_was_done_before_the_link_was_lost_is_done_by_this_deployment(
    cli: Cli, operator: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost, the next try finds everything there: it was this command that sent and activated it."""
    bundle, lost = bundle_of(tmp_path, operator, WEIGHTS, 1), list[str]()
    real = Agent.activate

    def answer_lost(agent: Agent, *arguments: Any, **options: Any) -> Any:
        answer = real(agent, *arguments, **options)
        if not lost:
            lost.append("activate")
            raise LostLink("local: the link was cut")
        return answer

    monkeypatch.setattr(Agent, "activate", answer_lost)
    monkeypatch.setattr(retry, "FIRST_S", 0.01)
    done = deployed(cli, bundle, "local")
    assert (done["links_lost"], done["changed"], done["installed"]) == (1, True, True)
    assert done["sent_bytes"] > len(WEIGHTS) and done["active"]["bundle_version"] == 1
    details = read_log(audit_path()).entries[-1].details
    assert details["activated"] is True and details["sent_bytes"] == done["sent_bytes"]
    again = deployed(cli, bundle, "local")
    assert (again["changed"], again["sent_bytes"], again["active"]) == (False, 0, None)
