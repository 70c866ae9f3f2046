"""What provisioning decides before anything is sent: which runtimes, what stays, what is left out, when to do nothing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from device_agents import wire
from edgevit.errors import NotProvisioned
from edgevit.fleet import provision
from edgevit.fleet.agent import Have, Provisioned
from edgevit.fleet.provision import PILLOW, Prepared, Wishes, plan_provision, prepare
from edgevit.fleet.wheel_index import FoundWheel, IndexUnreachable, NoWheel
from edgevit.fleet.wheel_platform import WheelPlatform
from edgevit.profile import load_profile
from edgevit.progress import Progress, Quiet
from edgevit.report.provision_view import as_values, render_provision
from tests.support.runs import facts
from tests.support.wheels import make_wheel

CPU = wire.RuntimeFact("onnxruntime", "1.31.1", (wire.ProviderFact("CPUExecutionProvider", True),))
CUDA = wire.RuntimeFact("onnxruntime", "1.19.0", (wire.ProviderFact("CUDAExecutionProvider", True),))


class Device:
    """Knows its signers, has room and no wheel."""

    name = "box"

    def signers(self) -> tuple[str, ...]:
        return ("me",)

    def have(self, blobs: Iterable[wire.Blob]) -> Have:
        return Have(tuple(b.sha256 for b in blobs), {}, 10**9)


class Index:
    """Every package in some version, except ``lacking``; ``asked`` keeps what was looked for."""

    folder: Path
    lacking: Sequence[str] = ()
    answers = True
    asked: list[str]

    def __init__(self, *_: object) -> None: ...

    def fetch(self, requirements: Sequence[str], platform: WheelPlatform, progress: Progress) -> list[FoundWheel]:
        found = []
        for line in requirements:
            wanted = Requirement(line)
            type(self).asked.append(wanted.name)
            if not self.answers:
                raise IndexUnreachable("no answer")
            if wanted.name in self.lacking:
                raise NoWheel(wanted.name, f"no wheel of {line}")
            version = next(v for v in ("11", "2.1", "1.30", "1.26.4", "1.19.2") if wanted.specifier.contains(v))
            filename = f"{wanted.name.replace('-', '_')}-{version}-py3-none-any.whl"
            requires = ("numpy>=1.23.2",) if wanted.name == "ai-edge-litert" else ()
            found.append(make_wheel(self.folder, filename, requires))
        return found


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> type[Index]:
    class One(Index):
        folder = tmp_path / "index"
        asked: list[str] = []  # noqa: RUF012 -- a class for each test

    monkeypatch.setattr(provision, "PipIndex", One)
    return One


def prepared(name: str, device: wire.Facts, wishes: Wishes | None = None) -> Prepared:
    # A folder of wheels is not remembered, so every call asks.
    return prepare(Device(), "box", load_profile(name), device, "me", wishes or Wishes(Path("/given")), Quiet())  # type: ignore[arg-type]


def packages(made: Prepared) -> set[str]:
    assert made.house is not None
    return {w.package for w in made.house.wheels}


def environment(*requirements: str, system_site: bool = False, **changes: Any) -> wire.Environment:
    return wire.Environment(requirements, system_site, "3.11.2", **{"wheels": (), **changes})


def test_a_board_s_own_runtime_keeps_its_numpy_and_its_providers() -> None:
    plan = plan_provision("box", load_profile("jetson-orin-nano"), facts(python="3.10.12", runtimes=(CUDA,), numpy="1.21.5"))
    assert plan.given == (("numpy", "1.21.5"),) and plan.keep == ("onnxruntime/CUDAExecutionProvider",) and plan.system_site
    bare = plan_provision("box", load_profile("jetson-orin-nano"), facts(python="3.10.12", runtimes=(CPU,), numpy="1.21.5"))
    assert (bare.given, bare.keep) == ((), ())


def test_what_needs_a_newer_numpy_than_the_board_s_runtime_is_left_out(index: type[Index]) -> None:
    made = prepared("jetson-orin-nano", facts(python="3.10.12", runtimes=(CUDA,), numpy="1.21.5"))
    assert made.plan.runtimes == ("onnxruntime",) and made.request is not None and made.request.wheels == ()
    assert any("needs numpy 1.21.5 of the system" in reason for reason in made.plan.without)
    enough = prepared("jetson-orin-nano", facts(python="3.10.12", runtimes=(CUDA,), numpy="1.26.4"))
    assert {"ai-edge-litert", "pip"} == packages(enough), "numpy is the system's"


def test_a_32_bit_python_gets_the_32_bit_runtime() -> None:
    device = facts(soabi="cpython-311-arm-linux-gnueabihf", machine="aarch64", python="3.11.2")
    plan = plan_provision("box", load_profile("raspberry-pi-4b"), device)
    assert plan.runtimes == ("tflite-runtime",) and any(r.startswith("tflite-runtime") for r in plan.requirements)


def test_a_runtime_without_a_wheel_is_left_out_by_name(index: type[Index]) -> None:
    index.lacking = ("ai-edge-litert",)
    made = prepared("raspberry-pi-4b", facts(runtimes=()))
    assert made.plan.runtimes == ("onnxruntime",) and {"onnxruntime", "numpy", "pip"} == packages(made)
    assert any(reason.startswith("litert: no wheel of ai-edge-litert") for reason in made.plan.without)
    index.lacking = ("ai-edge-litert", "onnxruntime")
    with pytest.raises(NotProvisioned, match=r"no runtime of raspberry-pi-4b can be had: litert: .*; onnxruntime: ") as caught:
        prepared("raspberry-pi-4b", facts(runtimes=()))
    assert caught.value.hint == load_profile("raspberry-pi-4b").python_hint


def test_pillow_comes_where_asked_for_and_stays(index: type[Index]) -> None:
    assert "pillow" not in packages(prepared("raspberry-pi-4b", facts(runtimes=())))
    wishes = Wishes(Path("/given"), with_pillow=True)
    assert "pillow" in packages(prepared("raspberry-pi-4b", facts(runtimes=()), wishes))
    there = facts(runtimes=(CPU,), environment=environment(PILLOW))
    assert "pillow" in packages(prepared("raspberry-pi-4b", there))
    index.lacking = ("pillow",)
    with pytest.raises(NoWheel, match="pillow"):
        prepared("raspberry-pi-4b", facts(runtimes=()), wishes)


def test_nothing_is_asked_for_where_all_is_there(index: type[Index]) -> None:
    plan = plan_provision("box", load_profile("raspberry-pi-4b"), facts())
    there = facts(environment=environment(*plan.requirements))
    made = prepared("raspberry-pi-4b", there, Wishes())
    assert made.request is None and not index.asked
    assert prepared("raspberry-pi-4b", there, Wishes(upgrade=True)).request is not None and index.asked
    broken = prepared("raspberry-pi-4b", facts(runtimes=(), environment=environment(*plan.requirements)), Wishes())
    assert broken.request is not None and broken.request.fresh, "an environment that does not work was left alone"


def test_without_an_index_what_is_there_goes_on(index: type[Index]) -> None:
    index.answers = False
    plan = plan_provision("box", load_profile("raspberry-pi-4b"), facts())
    part = dict(plan.groups)["onnxruntime"]
    made = prepared("raspberry-pi-4b", facts(environment=environment(*part)), Wishes())
    assert made.request is None and made.plan.runtimes == ("onnxruntime",)
    assert "litert: it is not there, and the package index does not answer" in made.plan.without
    for device in (facts(runtimes=(CPU,)), facts(runtimes=(), environment=environment(*part))):
        with pytest.raises(IndexUnreachable):
            prepared("raspberry-pi-4b", device, Wishes())
    with pytest.raises(IndexUnreachable):
        prepared("raspberry-pi-4b", facts(environment=environment(*part)), Wishes(with_pillow=True))


def test_a_runtime_that_was_sent_and_works_not_is_named(index: type[Index]) -> None:
    """The other one passed its inference, so the environment is in use; neither may look as if both did."""
    onnx, litert = wire.RuntimeFact("onnxruntime", "1.31.1", (wire.ProviderFact("CPUExecutionProvider", True),)), "litert"
    mismatch = wire.RuntimeFact(litert, "2.3.0", (wire.ProviderFact("XNNPACK", False, "provider-mismatch: computes (0, 4)"),))
    made = prepared("raspberry-pi-4b", facts(runtimes=()))
    for found, why in (
        (facts(runtimes=(onnx,), absent={litert: "no-runtime: libfoo.so.1 is lacking"}), "libfoo.so.1 is lacking"),
        (facts(runtimes=(onnx, mismatch)), "XNNPACK: provider-mismatch: computes (0, 4)"),
    ):
        stream = io.StringIO()
        Console(file=stream, width=100).print(render_provision("box", made, found, Provisioned(True, 10)))
        said, values = " ".join(stream.getvalue().split()), as_values(made, found, Provisioned(True, 10))
        assert "box: onnxruntime 1.31.1; Python" in said and "does not work there: litert: " in said and why in said
        assert [r["runtime"] for r in values["runtimes"]] == ["onnxruntime"] and why in values["failing"][litert]
    assert as_values(made, facts(), Provisioned(True, 10))["failing"] == {}


def test_only_what_is_added_is_sent() -> None:
    one, two, other = (wire.Wheel(f"{n}-1-py3-none-any.whl", f"{i:064x}", 1) for i, n in enumerate(("one", "two", "one"), 1))
    pip = wire.Wheel("pip-1-py3-none-any.whl", "f" * 64, 1)

    def request(*wheels: wire.Wheel, **changes: Any) -> wire.EnvironmentRequest:
        return wire.EnvironmentRequest(
            **{"requirements": (), "system_site": False, "wheels": wheels, "unpacked_bytes": 0, **changes}
        )

    there = environment(wheels=(pip, one))
    assert request(one, pip, two).beyond(there) == (two, pip)
    assert request(one, pip).beyond(there) == ()
    assert request(pip, two).beyond(there) == (pip, two), "what is no longer wanted must go"
    assert request(pip, other, two).beyond(there) == (pip, other, two), "another version does not go beside the old one"
    assert request(one, pip, system_site=True).beyond(there) == (one, pip)
    assert request(one, pip, fresh=True).beyond(there) == (one, pip)
    assert request(one, pip).beyond(None) == (one, pip)
