"""Resolving wheels for other machines: the loop against real pip, recorded names of real wheels, and invented ones."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from edgevit.cache import Cache
from edgevit.errors import NotProvisioned
from edgevit.fleet.wheel_index import FoundWheel, IndexUnreachable, NoWheel, PipIndex
from edgevit.fleet.wheel_platform import WheelPlatform, markers
from edgevit.fleet.wheelhouse import FRESH_S, resolve, resolve_remembered
from edgevit.profile import load_profile
from edgevit.progress import Progress, Quiet
from tests.support.wheels import make_index, make_wheel, platform, use_index, wheel_bytes

CASES = Path(__file__).resolve().parents[1] / "cases" / "wheels" / "index.json"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index with the names, the Python limits and the requirements of real wheels, and nothing in them."""
    folder = tmp_path_factory.mktemp("recorded")
    wheels = []
    for package in json.loads(CASES.read_text())["packages"].values():
        for filename, facts in package.items():
            path = folder / filename
            path.write_bytes(wheel_bytes(filename, facts["requires"], python=facts["python"]))
            wheels.append((path, facts["python"]))
    return make_index(folder, wheels)


def versions(wheels: Sequence[FoundWheel]) -> dict[str, str]:
    return {w.package: str(w.version) for w in wheels}


def roots_of(device: WheelPlatform, *runtimes: str) -> list[str]:
    options = [o for o in load_profile("raspberry-pi-4b").options(device.machine) if o.runtime in runtimes]
    options += [o for o in load_profile("generic-arm64").options(device.machine) if o.runtime in runtimes]
    return ["pip", *next(r for o in options if (r := o.requirements(device.python)))]


@pytest.mark.parametrize(
    ("device", "runtime", "expected"),
    [
        (platform("3.8.10", glibc=31), "onnxruntime", {"onnxruntime": "1.19.2", "numpy": "1.24.4", "pip": "25.0.1"}),
        (platform("3.9.2", glibc=31), "litert", {"ai-edge-litert": "2.1.0", "backports-strenum": "1.3.1"}),
        (platform("3.11.2", glibc=36), "onnxruntime", {"onnxruntime": "1.32.0"}),
        (platform("3.13.5", glibc=41), "litert", {"ai-edge-litert": "2.3.0", "ml-dtypes": "0.6.0"}),
    ],
    ids=lambda value: str(value) if isinstance(value, WheelPlatform) else None,
)
def test_every_python_on_arm_gets_the_versions_it_really_gets(
    device: WheelPlatform,
    runtime: str,
    expected: dict[str, str],
    recorded: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_index(monkeypatch, recorded)
    found = versions(resolve(roots_of(device, runtime), device, PipIndex(Cache(tmp_path)), {}, Quiet()).wheels)
    assert expected.items() <= found.items()
    # What humanfriendly asks for on Windows or Python 2, and litert for NPUs, concerns no board.
    assert not {n for n in found if n.startswith(("pyreadline", "monotonic", "ai-edge-litert-sdk"))}


@pytest.mark.parametrize(
    ("device", "wanted", "said"),
    [
        (platform("3.11.2", machine="armv7l", glibc=36), "tflite-runtime", r"no wheel of numpy.* there are wheels for aarch64"),
        (
            platform("3.11.2", glibc=27),
            "onnxruntime>=1.31",
            r"glibc 2\.27; on aarch64 there are for Python 3\.11.*\(glibc 2\.28",
        ),
    ],
    ids=("machine", "glibc"),
)
def test_a_device_without_a_wheel_is_refused_with_what_there_is(
    device: WheelPlatform, wanted: str, said: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_index(monkeypatch, recorded)
    roots = [wanted, "numpy<2"] if wanted == "tflite-runtime" else [wanted]
    with pytest.raises(NoWheel, match=said) as caught:
        resolve(roots, device, PipIndex(Cache(tmp_path)), {}, Quiet())
    if device.machine == "armv7l":
        assert "piwheels" in caught.value.hint


def test_a_folder_of_wheels_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    make_wheel(tmp_path / "given", "b-1.0-cp311-cp311-manylinux_2_28_aarch64.whl")
    source = PipIndex(Cache(tmp_path / "cache"), tmp_path / "given")
    assert versions(resolve(["b"], platform(), source, {}, Quiet()).wheels) == {"b": "1.0"}
    with pytest.raises(NoWheel, match=r"given: no wheel of b .*Python 3\.11 \(glibc 2\.28.*asked for by edgevit") as caught:
        resolve(["b"], platform("3.9.2"), source, {}, Quiet())
    assert str(tmp_path / "given") in caught.value.hint


def test_an_index_that_does_not_answer_is_told_from_a_missing_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(IndexUnreachable, match="did not answer") as caught:
        PipIndex(Cache(tmp_path)).fetch(["numpy"], platform(), Quiet())
    assert "--wheelhouse" in caught.value.hint


def test_a_file_that_is_no_wheel_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "a-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    with pytest.raises(NotProvisioned, match=r"a-1\.0-py3-none-any\.whl|pip found no wheels for a"):
        resolve(["a"], platform(), PipIndex(Cache(tmp_path / "cache"), folder), {}, Quiet())


# ---- the loop, without pip ---------------------------------------------------------------------------------------------


class Shelf:
    """Wheels in memory: the newest version that a specifier allows. Counts how often it is asked."""

    def __init__(self, wheels: dict[str, Sequence[str]]) -> None:
        self.wheels = [self._wheel(name, requires) for name, requires in wheels.items()]
        self.asked = 0
        self.unreachable = False

    @staticmethod
    def _wheel(name: str, requires: Sequence[str]) -> FoundWheel:
        package, version = name.split(" ")
        filename = f"{package}-{version}-py3-none-any.whl"
        return FoundWheel(filename, Path("/nowhere"), package, 1, 1, tuple(requires))

    def fetch(self, requirements: Sequence[str], platform: WheelPlatform, progress: Progress) -> list[FoundWheel]:
        self.asked += 1
        if self.unreachable:
            raise IndexUnreachable("no answer")
        found = []
        for line in requirements:
            wanted = Requirement(line)
            fits = [w for w in self.wheels if w.package == wanted.name and wanted.specifier.contains(str(w.version))]
            if not fits:
                raise NoWheel(wanted.name, f"no wheel of {wanted}")
            found.append(max(fits, key=lambda w: w.version))
        return found


def solve(shelf: Shelf, *roots: str, device: WheelPlatform | None = None, **given_: str) -> dict[str, str]:
    return versions(resolve(roots, device or platform(), shelf, given_, Quiet()).wheels)


def test_markers_are_the_device_s() -> None:
    shelf = Shelf(
        {
            "a 1": [
                'arm; platform_machine == "aarch64"',
                'intel; platform_machine == "x86_64"',
                'old; python_version < "3.10"',
                'windows; sys_platform == "win32"',
                'c; implementation_name == "cpython"',
            ],
            **{f"{n} 1": [] for n in ("arm", "intel", "old", "windows", "c")},
        }
    )
    assert set(solve(shelf, "a")) == {"a", "arm", "c"}
    assert set(solve(shelf, "a", device=platform("3.9.2", "x86_64"))) == {"a", "intel", "old", "c"}


def test_what_several_ask_of_one_package_holds_together() -> None:
    shelf = Shelf({"a 1": ["c>=1"], "b 1": ["c<2"], "c 1.5": [], "c 2.0": ["gone"], "gone 1": []})
    assert solve(shelf, "a", "b") == {"a": "1", "b": "1", "c": "1.5"}


def test_what_a_replaced_version_required_is_not_kept() -> None:
    shelf = Shelf({"a 1": ["c"], "b 1": ["d"], "d 1": ["c<2"], "c 2": ["gone"], "c 1": [], "gone 1": []})
    assert solve(shelf, "a", "b") == {"a": "1", "b": "1", "c": "1", "d": "1"}


def test_extras_are_followed_where_asked_for() -> None:
    shelf = Shelf({"a 1": ['b; extra == "more"', "c"], "b 1": [], "c 1": []})
    assert set(solve(shelf, "a")) == {"a", "c"}
    assert set(solve(shelf, "a[more]")) == {"a", "b", "c"}


def test_a_package_of_the_system_is_left_to_it() -> None:
    shelf = Shelf({"a 1": ["numpy>=1.21"], "b 1": ["numpy>=1.23.2"], "numpy 2.4": []})
    assert solve(shelf, "a", numpy="1.21.5") == {"a": "1"}
    with pytest.raises(NoWheel, match=r"b 1 asks for numpy>=1\.23\.2, the board's own runtime needs numpy 1\.21\.5"):
        solve(shelf, "b", numpy="1.21.5")


def test_a_conflict_names_who_asks() -> None:
    with pytest.raises(NoWheel, match=r"no wheel of c<2,>=2|no wheel of c>=2,<2") as caught:
        solve(Shelf({"a 1": ["c>=2"], "b 1": ["c<2"], "c 1": [], "c 2": []}), "a", "b")
    assert "asked for by a 1, b 1" in str(caught.value)


def test_an_address_instead_of_a_version_is_refused() -> None:
    with pytest.raises(NotProvisioned, match="an address"):
        solve(Shelf({"a 1": ["b @ https://example.org/b-1-py3-none-any.whl"]}), "a")


def test_requirements_that_never_settle_end() -> None:
    shelf = Shelf({"a 1": ["b>=2"], "a 2": ["b<2"], "b 1": ["a<2"], "b 2": ["a>=2"]})
    with pytest.raises(NotProvisioned, match=r"did not settle in \d+ rounds"):
        solve(shelf, "a")


PACKAGES = ("p", "q", "r", "s", "t")
MARKS = ("", '; python_version < "3.10"', '; platform_machine == "aarch64"', '; sys_platform == "darwin"')
LINES = st.builds(
    lambda name, low, mark: f"{name}{low}{mark}",
    st.sampled_from(PACKAGES),
    st.sampled_from(("", ">=1", ">=2")),
    st.sampled_from(MARKS),
)


@settings(max_examples=100, deadline=None)
@given(graph=st.dictionaries(st.sampled_from(PACKAGES), st.lists(LINES, max_size=4), min_size=len(PACKAGES)), old=st.booleans())
def test_the_set_is_closed_and_holds_nothing_else(graph: dict[str, list[str]], old: bool) -> None:
    device = platform("3.9.2" if old else "3.11.2")
    shelf = Shelf({f"{name} {v}": lines for name, lines in graph.items() for v in ("1", "2")})
    found = {w.package: w for w in resolve(["p"], device, shelf, {}, Quiet()).wheels}
    asked = {"p"}
    for wheel in found.values():
        for line in wheel.requires:
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate(dict(markers(device))):
                assert inner.specifier.contains(str(found[inner.name].version))
                asked.add(inner.name)
    assert asked == set(found)


# ---- remembering -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made = Shelf({})
    made.wheels = [
        make_wheel(tmp_path / "shelf", "a-1.0-py3-none-any.whl"),
        make_wheel(tmp_path / "shelf", "b-1.0-py3-none-any.whl"),
    ]
    return made


def test_one_kind_of_device_is_resolved_once_a_day(shelf: Shelf, tmp_path: Path) -> None:
    cache, now = Cache(tmp_path / "cache"), time.time()

    def ask(at: float = now, upgrade: bool = False, device: WheelPlatform | None = None) -> float | None:
        house = resolve_remembered(["a"], device or platform(), shelf, {}, Quiet(), cache=cache, upgrade=upgrade, now=at)
        assert versions(house.wheels) == {"a": "1.0"} and house.wheels[0].path.is_file()
        return house.remembered

    assert ask() is None and shelf.asked == 1
    assert ask(now + FRESH_S / 2) == now and shelf.asked == 1, "the same was asked twice in a day"
    assert ask(device=platform("3.9.2")) is None and shelf.asked == 2
    assert ask(now + FRESH_S + 1) is None and shelf.asked == 3
    assert ask(now + FRESH_S + 2, upgrade=True) is None and shelf.asked == 4
    shelf.unreachable = True
    assert ask(now + 9 * FRESH_S) is not None, "without an index, what was resolved earlier counts"
    (blob,) = [p for p in (tmp_path / "cache" / "blobs").iterdir() if p.stat().st_size == shelf.wheels[0].size]
    blob.write_bytes(b"x" * shelf.wheels[0].size)
    with pytest.raises(IndexUnreachable):
        ask(now + 9 * FRESH_S)


def test_what_is_asked_to_be_newest_needs_the_index(shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    resolve_remembered(["a"], platform(), shelf, {}, Quiet(), cache=cache)
    shelf.unreachable = True
    with pytest.raises(IndexUnreachable):
        resolve_remembered(["a"], platform(), shelf, {}, Quiet(), cache=cache, upgrade=True)
