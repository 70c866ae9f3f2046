"""Tags and markers of a device: the same rules as ``packaging`` applies on the machine it runs on."""

from __future__ import annotations

import dataclasses
import platform as this
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging import _manylinux, tags
from packaging.markers import default_environment

from device_agents.probe import parse_musl, read_libc, read_soabi
from edgevit.errors import NotProvisioned
from edgevit.fleet.wheel_platform import explain_absence, markers, platform_of, platform_tags, wheel_tags
from tests.support.runs import facts
from tests.support.wheels import platform


def facts_of_this_machine() -> object:
    version = "{}.{}.{}".format(*sys.version_info[:3])
    return facts(machine=this.machine(), python=version, libc=read_libc(), soabi=read_soabi(), kernel=this.release())


def test_this_machine_accepts_what_packaging_says_it_accepts() -> None:
    here = platform_of("here", facts_of_this_machine())  # type: ignore[arg-type]
    # As sets: releases of packaging differ in whether the plain linux tag comes first or last.
    assert set(platform_tags(here)) == set(tags.platform_tags())
    assert set(wheel_tags(here)) == set(tags.sys_tags())


def test_this_machine_s_markers_are_packaging_s() -> None:
    here = markers(platform_of("here", facts_of_this_machine()))  # type: ignore[arg-type]
    wanted = {k: str(v) for k, v in default_environment().items()}
    assert set(here) == {*wanted, "extra"}, "a marker would be taken from this machine"
    told = {k: v for k, v in here.items() if k not in ("extra", "platform_version")}
    assert told == {k: v for k, v in wanted.items() if k != "platform_version"}


@settings(max_examples=60, deadline=None)
@given(minor=st.integers(2, 60), machine=st.sampled_from(["x86_64", "i686", "aarch64", "armv7l", "riscv64"]))
def test_tags_of_any_glibc_are_packaging_s(minor: int, machine: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_manylinux, "_get_glibc_version", lambda: (2, minor))
        patch.setattr(_manylinux, "_have_compatible_abi", lambda *_: True)
        patch.setattr(_manylinux, "_is_compatible", lambda *_: True)
        wanted = list(_manylinux.platform_tags([machine]))
    assert platform_tags(platform(machine=machine, glibc=minor)) == [*wanted, f"linux_{machine}"]


@given(minor=st.integers(17, 60))
def test_a_newer_c_library_loses_nothing(minor: int) -> None:
    assert set(platform_tags(platform(glibc=minor))) < set(platform_tags(platform(glibc=minor + 1)))


@pytest.mark.parametrize(
    ("soabi", "machine", "abi", "expected"),
    [
        ("cpython-311-aarch64-linux-gnu", "aarch64", "cp311", "aarch64"),
        ("cpython-311-arm-linux-gnueabihf", "aarch64", "cp311", "armv7l"),
        ("cpython-311-arm-linux-gnueabihf", "armv7l", "cp311", "armv7l"),
        ("cpython-311-arm-linux-gnueabihf", "armv6l", "cp311", "armv6l"),
        ("cpython-311-i386-linux-gnu", "x86_64", "cp311", "i686"),
        ("cpython-311t-x86_64-linux-gnu", "x86_64", "cp311t", "x86_64"),
        ("cpython-311d-x86_64-linux-gnu", "x86_64", "cp311", "x86_64"),
        (None, "aarch64", "cp311", "aarch64"),
    ],
)
def test_the_machine_is_the_one_python_was_built_for(soabi: str | None, machine: str, abi: str, expected: str) -> None:
    made = platform_of("pi", facts(soabi=soabi, machine=machine))
    assert (made.abi, made.machine, made.kernel_machine) == (abi, expected, machine)
    assert markers(made)["platform_machine"] == machine


def test_a_32_bit_python_under_a_64_bit_kernel_takes_32_bit_wheels() -> None:
    found = platform_tags(platform_of("pi", facts(soabi="cpython-311-arm-linux-gnueabihf", machine="aarch64")))
    assert "manylinux_2_34_armv7l" in found and "linux_armv7l" in found
    assert not any(tag.endswith("aarch64") for tag in found)


def test_a_free_threaded_python_takes_no_ordinary_extension() -> None:
    found = {str(t) for t in wheel_tags(dataclasses.replace(platform("3.13.0"), abi="cp313t"))}
    assert "cp313-cp313t-manylinux_2_36_aarch64" in found
    assert not any(t.startswith(("cp313-cp313-", "cp313-abi3-", "cp38-abi3-")) for t in found)


def test_musl_is_not_glibc() -> None:
    made = platform_of("alpine", facts(libc="musl 1.2.4"))
    assert platform_tags(made) == [f"musllinux_1_{n}_aarch64" for n in (2, 1, 0)] + ["linux_aarch64"]
    assert platform_tags(platform_of("odd", facts(libc=None))) == ["linux_aarch64"]


def test_what_musl_s_loader_says() -> None:
    assert parse_musl("musl libc (aarch64)\nVersion 1.2.4\nDynamic Program Loader\nUsage: ld-musl") == "musl 1.2.4"
    assert parse_musl("") is None and parse_musl("ld.so (GNU libc) 2.36\nVersion x") is None


def test_pypy_is_refused_with_what_to_do() -> None:
    with pytest.raises(NotProvisioned, match="pypy310") as caught:
        platform_of("pi", facts(soabi="pypy310-pp73-aarch64-linux-gnu"))
    assert "--python" in caught.value.hint


ONNXRUNTIME = [
    "onnxruntime-1.19.2-cp38-cp38-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
    "onnxruntime-1.19.2-cp39-cp39-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
    "onnxruntime-1.19.2-cp39-cp39-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_aarch64.whl",
    "onnxruntime-1.31.1-cp313-cp313t-manylinux_2_28_aarch64.whl",
    "onnxruntime-0.1.2-cp35-cp35m-manylinux1_x86_64.whl",
    "onnxruntime-bad.whl",
]


@pytest.mark.parametrize(
    ("device", "specifier", "said"),
    [
        (
            platform("3.7.3", glibc=28),
            ">=1.19",
            "no wheel of onnxruntime>=1.19 for Python 3.7 on aarch64 with glibc 2.28; on aarch64 there are for "
            "Python 3.8, 3.9 (glibc 2.27 or newer); Python 3.11, 3.13t (glibc 2.28 or newer)",
        ),
        (platform("3.9.2", machine="armv7l"), "==1.19.2", "there are wheels for aarch64, x86_64"),
        (platform("3.9.2"), "==9", "there is no wheel of it at all"),
    ],
)
def test_a_refusal_names_what_would_work(device: object, specifier: str, said: str) -> None:
    assert explain_absence(device, "onnxruntime", specifier, ONNXRUNTIME).endswith(said)  # type: ignore[arg-type]


def test_a_refusal_speaks_of_stable_abis() -> None:
    said = explain_absence(platform("3.7.3"), "protobuf", "", ["protobuf-7.36.2-cp310-abi3-manylinux2014_aarch64.whl"])
    assert said.endswith("on aarch64 there are for Python 3.10 or newer (glibc 2.17 or newer)")
