"""``edgevit target prune``: what nobody uses goes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from edgevit.fleet.connect import connect
from edgevit.fleet.inventory import local_target
from edgevit.places import local_root
from edgevit.transport.prompts import NoPrompts
from tests.support.agent_bundle import Signer, make_bundle
from tests.support.cli import Cli, active
from tests.support.local import installed_locally


def test_what_is_active_or_was_before_it_stays_and_the_rest_goes(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    made = [make_bundle(operator, version=v, extra_blob=f'["{v}"]'.encode()) for v in (1, 2, 3)]
    for bundle in made:
        said = cli("deploy", bundle.write(tmp_path / f"v{bundle.manifest.version}"), "local")
        assert said.code == 0, said.err
    before = sorted(installed_locally())
    assert before == sorted(bundle.digest for bundle in made)

    said = cli("target", "prune", "local", "--dry-run")
    assert said.code == 0 and "local: 1 bundles would go" in said.out and "version 1" in said.out
    assert sorted(installed_locally()) == before, "a dry run removed something"

    said = cli("target", "prune", "local", "--json")
    (row,) = json.loads(said.out)["targets"]
    assert said.code == 0 and row["removed_bundles"] == 1 and row["freed_bytes"] == 5
    assert [one["bundle"] for one in row["idle"]] == [made[0].digest]
    assert sorted(installed_locally()) == sorted(bundle.digest for bundle in made[1:])
    assert active()["bundle_version"] == 3
    assert cli("rollback", "local").code == 0 and active()["bundle_version"] == 2

    said = cli("target", "prune", "local")
    assert said.code == 0 and "nothing lies there that nobody uses" in said.out
    actions = [entry["action"] for entry in json.loads(cli("fleet", "audit", "--json").out)["entries"]]
    assert actions[-5:] == ["deploy", "deploy", "target prune", "rollback", "target prune"], "a dry run is no action"


def test_another_operators_lock_keeps_it_out(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        assert cli("deploy", make_bundle(operator, version=version).write(tmp_path / str(version)), "local").code == 0
    with connect(local_target(), NoPrompts()) as agent:
        assert agent.take_lock("ann@desk", "deploy tiny v4", "a" * 32, 600.0).taken
    cli("target", "prune", "local").refused(3, "ann@desk", "--take-over")
    assert len(installed_locally()) == 3
    assert cli("target", "prune", "local", "--take-over").code == 0
    assert len(installed_locally()) == 2


def test_nobody_takes_everything_away_from_under_another_operator(cli: Cli, operator: Signer, tmp_path: Path) -> None:
    assert cli("deploy", make_bundle(operator).write(tmp_path / "v1"), "local").code == 0
    with connect(local_target(), NoPrompts()) as agent:
        assert agent.take_lock("ann@desk", "deploy tiny v4", "a" * 32, 600.0).taken
    cli("target", "unprovision", "local", "--yes").refused(3, "ann@desk", "--take-over")
    assert len(installed_locally()) == 1
    assert cli("target", "unprovision", "local", "--yes", "--take-over").code == 0
    assert not local_root().exists(), "something was left there, or brought back"
