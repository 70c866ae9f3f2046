"""Plans are pure: what will be sent, installed and activated follows from the bundle, the facts and what is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from edgevit.bundle import Bundle
from edgevit.errors import DeviceRefused, NotProvisioned, UsageError
from edgevit.fleet.agent import Have
from edgevit.fleet.deploy import DeployPlan, check_fits, choose_default_variant, plan_deploy
from edgevit.fleet.provision import plan_provision
from edgevit.fleet.refusals import HINTS, NEEDS_PROVISION, map_refusal
from edgevit.profile import load_profile
from tests.support.bundles import make_manifest


def bundle_of(version: int = 3, fits: tuple[str, ...] = ("generic-x86-64",)) -> Bundle:
    manifest, _ = make_manifest(version=version, fits=fits)
    return Bundle(Path("b"), manifest, b"", b"", "d" * 64)


def facts_of(**changes: Any) -> wire.Facts:
    base: dict[str, Any] = {f.name: None for f in dataclasses.fields(wire.Facts)}
    base.update(
        schema=wire.FACTS_SCHEMA, agent_version=1, agent_sha256="", hostname="box", kernel="6", machine="x86_64", cpu_count=4,
        cpu_features=(), python="3.11.2", disk_free_mb=1000, clock_utc="", runtimes=(), sensors=(), ssh_keygen="OpenSSH_9.2",
        signers=1, bundles=(), waiting_runs=(), absent={},
    )  # fmt: skip
    return wire.Facts(**{**base, **changes})


def runtime(name: str, provider: str, proven: bool = True) -> wire.RuntimeFact:
    return wire.RuntimeFact(name, "1", (wire.ProviderFact(provider, proven),))


BUNDLE = bundle_of()
VARIANT = wire.Variant(BUNDLE.digest, "fp32-onnx", "onnxruntime", "CPUExecutionProvider", 4)
EVERYTHING = tuple(b.sha256 for b in BUNDLE.manifest.blobs())
TOTAL = sum(b.size for b in BUNDLE.manifest.blobs())


def active(version: int, variant: wire.Variant = VARIANT) -> wire.Active:
    return wire.Active(variant, BUNDLE.manifest.name, version, "test", "2026-01-01T00:00:00Z")


def plan(facts: wire.Facts, have: Have, **options: bool) -> DeployPlan:
    return plan_deploy(BUNDLE, "box", facts, have, VARIANT, "test", **options)


def test_an_empty_device_gets_everything() -> None:
    made = plan(facts_of(), Have(EVERYTHING, {}, 10**9))
    assert (made.send_bytes, len(made.send), made.install, made.activate) == (TOTAL, len(EVERYTHING), True, VARIANT)
    assert not made.nothing_to_do
    assert made.as_json()["send_bytes"] == TOTAL


def test_what_is_there_in_part_is_not_sent_again() -> None:
    first = BUNDLE.manifest.blobs()[0]
    made = plan(facts_of(), Have(EVERYTHING, {first.sha256: 100, "f" * 64: 5}, 10**9))
    assert made.send_bytes == TOTAL - 100
    odd = plan(facts_of(), Have(EVERYTHING, {first.sha256: first.size * 9}, 10**9))
    assert odd.send_bytes == TOTAL - first.size


def test_what_the_device_copies_is_not_sent_but_takes_space() -> None:
    first = BUNDLE.manifest.blobs()[0]
    have = Have(EVERYTHING, {first.sha256: first.size}, TOTAL, copied_bytes=first.size)
    assert plan(facts_of(), have).send_bytes == TOTAL - first.size
    with pytest.raises(DeviceRefused, match="needs"):
        plan(facts_of(), dataclasses.replace(have, free_bytes=TOTAL - 1))


def test_nothing_to_do_is_said() -> None:
    there = wire.InstalledBundle(BUNDLE.digest, BUNDLE.manifest.name, 3)
    made = plan(facts_of(bundles=(there,), active=active(3)), Have((), {}, 0))
    assert made.nothing_to_do
    assert "nothing to do" in made.text()
    other = dataclasses.replace(VARIANT, threads=1)
    again = plan(facts_of(bundles=(there,), active=active(3, other)), Have((), {}, 0))
    assert (again.install, again.activate) == (False, VARIANT)


def test_a_device_without_space_or_with_a_newer_version_refuses_before_the_first_byte() -> None:
    with pytest.raises(DeviceRefused) as space:
        plan(facts_of(), Have(EVERYTHING, {}, TOTAL - 1))
    assert space.value.code == "no-space"
    with pytest.raises(DeviceRefused) as older:
        plan(facts_of(active=active(4)), Have((), {}, 0))
    assert older.value.code == "older-version"
    assert "--allow-older" in older.value.hint
    newer = active(4, dataclasses.replace(VARIANT, bundle="e" * 64))
    assert plan(facts_of(active=newer), Have((), {}, 0), allow_older=True).activate == VARIANT


def test_a_variant_of_another_bundle_is_refused() -> None:
    with pytest.raises(UsageError, match="not in the bundle"):
        plan_deploy(BUNDLE, "box", facts_of(), Have((), {}, 0), dataclasses.replace(VARIANT, bundle="e" * 64), "test")


def test_the_default_variant_is_the_first_artifact_that_a_proven_runtime_runs() -> None:
    profile = load_profile("generic-x86-64")
    both = (runtime("litert", "XNNPACK"), runtime("onnxruntime", "CPUExecutionProvider"))
    assert choose_default_variant(BUNDLE, "box", facts_of(runtimes=both), profile).artifact == "fp32-onnx"
    unproven = (runtime("onnxruntime", "CPUExecutionProvider", False), runtime("litert", "XNNPACK"))
    assert choose_default_variant(BUNDLE, "box", facts_of(runtimes=unproven), profile).artifact == "fp32-tflite"
    with pytest.raises(NotProvisioned) as caught:
        choose_default_variant(BUNDLE, "box", facts_of(), profile)
    assert caught.value.hint == "edgevit target provision box"


def test_a_bundle_for_other_boards_names_both_sides() -> None:
    with pytest.raises(UsageError, match=r"raspberry-pi-5.*generic-x86-64"):
        check_fits(bundle_of(fits=("raspberry-pi-5",)).manifest, "box", "generic-x86-64")


def test_every_code_of_the_agent_has_a_hint() -> None:
    from device_agents.errors import REFUSAL_CODES

    assert set(HINTS) == set(REFUSAL_CODES)
    for code in REFUSAL_CODES:
        error = map_refusal("box", wire.Refusal(code, "because"))
        assert error.hint
        assert "{" not in error.hint
        assert isinstance(error, NotProvisioned) == (code in NEEDS_PROVISION)
        assert isinstance(error, NotProvisioned) or (isinstance(error, DeviceRefused) and error.code == code)


def test_a_code_of_a_newer_agent_keeps_its_own_hint() -> None:
    error = map_refusal("box", wire.Refusal("something-new", "because", "do {this}"))
    assert error.hint == "do {this}"


@pytest.mark.parametrize(("python", "machine"), [("3.11.2", "x86_64"), ("3.9.2", "x86_64"), ("3.8.10", "x86_64")])
def test_requirements_follow_the_device_s_python(python: str, machine: str) -> None:
    made = plan_provision("box", load_profile("generic-x86-64"), facts_of(python=python, machine=machine))
    assert any(r.startswith("onnxruntime") for r in made.requirements)
    assert any(r.startswith("numpy") for r in made.requirements)
    if python.startswith(("3.8", "3.9")):
        assert "onnxruntime==1.19.2" in made.requirements


def test_no_wheel_for_the_device_s_python_says_so() -> None:
    with pytest.raises(NotProvisioned, match=r"3\.6\.9"):
        plan_provision("box", load_profile("raspberry-pi-4b"), facts_of(python="3.6.9", machine="aarch64"))


def test_a_device_that_cannot_verify_is_refused_naming_what_to_install() -> None:
    with pytest.raises(NotProvisioned) as caught:
        plan_provision("box", load_profile("jetson-nano"), facts_of(ssh_keygen=None, machine="aarch64"))
    assert "openssh-client" in caught.value.hint


def test_a_runtime_of_the_board_s_vendor_is_left_alone() -> None:
    profile = load_profile("jetson-orin-nano")
    vendor = (runtime("onnxruntime", "CUDAExecutionProvider"),)
    made = plan_provision("box", profile, facts_of(python="3.10.12", machine="aarch64", runtimes=vendor))
    assert made.system_site
    assert not any(r.startswith("onnxruntime") for r in made.requirements)
    bare = plan_provision("box", profile, facts_of(python="3.10.12", machine="aarch64"))
    assert any(r.startswith("onnxruntime") for r in bare.requirements)


@pytest.mark.parametrize("name", ["jetson-orin-nano", "raspberry-pi-5", "generic-x86-64"])
def test_provisioning_again_asks_for_the_same(name: str) -> None:
    """What the first one installed is proven then; taken for the vendor's, it would be thrown away."""
    profile, machine = load_profile(name), "x86_64" if name == "generic-x86-64" else "aarch64"
    python = "3.10.12" if "jetson" in name else "3.11.2"
    first = plan_provision("box", profile, facts_of(python=python, machine=machine))
    installed = (runtime("onnxruntime", "CPUExecutionProvider"), runtime("litert", "XNNPACK"))
    again = plan_provision("box", profile, facts_of(python=python, machine=machine, runtimes=installed))
    assert again == first
