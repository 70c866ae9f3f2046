"""The twelve shipped profiles: well-formed, sourced, found by the board's own model string, and refused where they must be."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from device_agents.wire import Facts
from edgevit.errors import ConfigError, UnknownName
from edgevit.profile import (
    check_target_profile,
    list_profiles,
    load_profile,
    onnx_ceiling,
    profile_titles,
    propose_profile,
)
from edgevit.report.profile_view import render_profile, render_profiles
from tests.support.runs import facts

ROOT = Path(__file__).resolve().parents[2]

NAMES = [
    "generic-arm64",
    "generic-x86-64",
    "jetson-agx-orin",
    "jetson-nano",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-tx2",
    "jetson-xavier-nx",
    "raspberry-pi-3b-plus",
    "raspberry-pi-4b",
    "raspberry-pi-5",
    "raspberry-pi-zero-2w",
]


def board(model: str | None, **changes: object) -> Facts:
    changes = {"machine": "aarch64", "cpu_features": (), "memory_mb": None, "python": "3.11.2", **changes}
    return dataclasses.replace(facts(), board_model=model, **changes)


def test_the_twelve_are_there() -> None:
    assert list_profiles() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_loads_and_shows_each_fact_with_status_and_source(name: str) -> None:
    profile = load_profile(name)
    assert profile_titles()[name] == profile.title, "the quick reading of the title and the full one differ"
    for width in (80, 100):
        out = io.StringIO()
        Console(file=out, width=width).print(render_profile(profile))
        text = out.getvalue()
        assert max(len(line) for line in text.splitlines()) <= width
        folded = "".join(text.split())
        for line in profile.fact_lines():
            assert line.status in ("measured", "documented", "unproven")
            assert line.source
            assert "".join(line.source.split())[:12] in folded
        assert "documented" in text
    # Every runtime a build aims at has a ceiling, and every Python it names has an install line.
    for option in profile.runtimes:
        assert (option.ceiling is None) == (option.runtime != "onnxruntime")
        assert option.pip or option.system
        if option.runtime == "tflite-runtime":
            assert {"int8-dynamic", "int4-weights"} <= set(option.refuses), "it returns garbage for these without an error"
    ceiling = onnx_ceiling([profile])
    assert ceiling is not None
    assert (ceiling.ir_version, ceiling.opset) == (10, 21)


def test_requirements_by_python() -> None:
    pi = load_profile("raspberry-pi-4b")
    by_name = {o.runtime: o for o in pi.runtimes}
    assert by_name["onnxruntime"].requirements("3.9.2") == ("onnxruntime==1.19.2", "numpy>=1.21,<2")
    assert by_name["litert"].requirements("3.11.2") == ("ai-edge-litert>=2.1,<3", "numpy>=1.26")
    assert by_name["litert"].requirements("3.8.10") is None
    assert [o.runtime for o in pi.options("armv7l")] == ["tflite-runtime"]
    assert pi.formats == ("tflite", "onnx")


def test_nano_and_tx2_run_on_the_cpu_and_refuse_their_gpu_with_what_it_needs() -> None:
    for name in ("jetson-nano", "jetson-tx2"):
        profile = load_profile(name)
        assert [(o.runtime, o.providers) for o in profile.runtimes] == [("onnxruntime", ("CPUExecutionProvider",))]
        assert profile.runtimes[0].requirements("3.8.0") is not None
        assert profile.gpu is not None
        assert (profile.gpu.usable, profile.gpu.status) == (False, "unproven")
        for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
            refusal = profile.refusal("onnxruntime", provider)
            assert refusal is not None
            assert "CUDA 10.2" in refusal
        assert profile.refusal("onnxruntime", "CPUExecutionProvider") is None
        assert any("ssh-keygen -Y" in n.value for n in profile.notes), "stock JetPack 4 cannot verify a signature: say so"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry-pi-3b-plus"),
        ("Raspberry Pi 4 Model B Rev 1.4\0", "raspberry-pi-4b"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi 500 Rev 1.0", "generic-arm64"),
        ("Raspberry Pi 3 Model B Rev 1.2", "generic-arm64"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Nano 2GB Developer Kit", "jetson-nano"),
        ("quill", "jetson-tx2"),
        ("NVIDIA Jetson TX2 Developer Kit", "jetson-tx2"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("NVIDIA Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson-orin-nano"),
        ("NVIDIA Orin NX Developer Kit", "jetson-orin-nx"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        ("Jetson-AGX", "generic-arm64"),
        (None, "generic-arm64"),
    ],
)
def test_the_board_names_its_profile(model: str | None, name: str) -> None:
    assert propose_profile(board(model)) == name


def test_no_proposal_where_nothing_fits() -> None:
    assert propose_profile(board(None, machine="x86_64")) == "generic-x86-64"
    assert propose_profile(board(None, machine="riscv64")) is None
    assert propose_profile(board("Raspberry Pi 2 Model B Rev 1.1", machine="armv7l")) is None


def test_findings_of_another_board_python_and_machine() -> None:
    pi5 = load_profile("raspberry-pi-5")
    good = board("Raspberry Pi 5 Model B Rev 1.0", cpu_features=(*pi5.isa.has, "fp"), memory_mb=8062)
    assert check_target_profile(pi5, good) == []
    other = check_target_profile(pi5, board("Raspberry Pi 4 Model B Rev 1.4", python="3.7.3"))
    assert [(f.severity, f.hint) for f in other] == [
        ("error", "--profile raspberry-pi-4b"),
        ("error", "install Raspberry Pi OS bullseye or later"),
    ]
    assert "'Raspberry Pi 4 Model B Rev 1.4', which is not a Raspberry Pi 5" in other[0].message
    assert [f.severity for f in check_target_profile(pi5, board(None, machine="x86_64"))] == ["error"]
    odd = check_target_profile(pi5, board(None, cpu_features=("asimd", "crc32", "i8mm"), memory_mb=64000))
    assert [f.severity for f in odd] == ["warning"] * 3


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean raspberry-pi-4b"):
        load_profile("rasberry-pi-4")


def test_a_persons_own_profile_by_path_with_every_problem_at_once(tmp_path: Path) -> None:
    text = (ROOT / "profiles" / "raspberry-pi-4b.yaml").read_text("utf-8")
    own = tmp_path / "my-board.yaml"
    own.write_text(text.replace("name: raspberry-pi-4b", "name: my-board"))
    assert load_profile(str(own)).name == "my-board"
    own.write_text(text)
    with pytest.raises(ConfigError, match="got 'raspberry-pi-4b', expected 'my-board' as the file is called"):
        load_profile(str(own))
    broken = text.replace("status: documented", "status: documentd", 1).replace("cores:", "coers:").replace("[4, 1, 2]", "[0]")
    broken = broken.replace("'^Raspberry Pi 4 Model B'", "'^('").replace("['3.11']", "['3']")
    own.write_text(broken)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(own))
    said = "\n".join(caught.value.problems)
    for expected in ("did you mean 'documented'", "coers: unknown key; did you mean 'cores'", "got [0]", "such as '3.11'"):
        assert expected in said
    assert all(p.startswith(f"{own}:") for p in caught.value.problems)


def test_the_listing_loads_neither_pydantic_nor_yaml_and_names_all() -> None:
    program = (
        "import sys\n"
        "from edgevit.profile import profile_titles\n"
        "from edgevit.report.profile_view import render_profiles\n"
        "from rich.console import Console\n"
        "Console(width=80).print(render_profiles(profile_titles()))\n"
        "heavy = {'pydantic', 'ruamel', 'torch', 'onnxruntime', 'paramiko', 'sqlalchemy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)


def test_the_listing_fits_80_columns() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(render_profiles(profile_titles()))
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80


def test_schemas_for_editors_are_in_step() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/schemas.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
