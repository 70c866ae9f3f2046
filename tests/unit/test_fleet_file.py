"""Ranges and groups in the fleet file: what they unfold to, what one entry says otherwise, and what is refused."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevit.cli import run_cli
from edgevit.errors import ConfigError, UnknownName, UsageError
from edgevit.fleet.inventory import MAX_RANGE, Target, add_target, expand_range, load_fleet, make_target, remove_target, select

HEAD = "schema: edgevit.fleet/1\n"
ATTIC = """\
targets:
  kitchen:
    host: 192.0.2.1
  pi-[08-11]:
    host: pi-[08-11].local
    group: attic
    tags: [cold]
  pi-09:
    profile: raspberry-pi-5
    user: root
groups:
  attic:
    user: pi
    profile: raspberry-pi-4b
    tags: [lab]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(HEAD + text)
    return path


def test_a_range_takes_its_group_s_defaults_and_one_of_it_says_otherwise(home: Path, tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path / "f", ATTIC))
    assert [t.name for t in fleet.targets] == ["kitchen", "pi-08", "pi-09", "pi-10", "pi-11"]
    assert fleet.targets[1] == Target(
        name="pi-08", host="pi-08.local", user="pi", profile="raspberry-pi-4b", tags=("lab", "attic", "cold")
    )
    nine = fleet.targets[2]
    assert (nine.host, nine.user, nine.profile, nine.tags) == (
        "pi-09.local",
        "root",
        "raspberry-pi-5",
        ("lab", "attic", "cold"),
    )
    assert [t.name for t in select(fleet, ["tag:attic"])] == ["pi-08", "pi-09", "pi-10", "pi-11"]
    listed = "targets:\n  - {name: 'a[1-3]', host: '192.0.2.[1-3]'}\n"
    assert [t.host for t in load_fleet(write(tmp_path / "l", listed)).targets] == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


@given(
    st.text("abz-.", max_size=8),
    st.integers(0, 9000),
    st.integers(0, MAX_RANGE - 1),
    st.integers(1, 6),
    st.text("az-.", max_size=8),
)
def test_a_range_has_every_number_once_in_order(before: str, low: int, span: int, width: int, after: str) -> None:
    first, last = str(low).zfill(width)[-6:], str(low + span)
    names = expand_range(f"{before}[{first}-{last}]{after}")
    assert len(names) == len(set(names)) == span + 1
    numbers = [name[len(before) : len(name) - len(after)] for name in names]
    assert [int(n) for n in numbers] == list(range(low, low + span + 1))
    assert numbers[0] == first


@given(st.text("abc019.-_:", max_size=30))
def test_a_text_without_brackets_is_itself(text: str) -> None:
    assert expand_range(text) == [text]


@pytest.mark.parametrize("text", ["a[1-", "a]", "a[x-y]", "a[3-1]", f"a[0-{MAX_RANGE}]", "a[1-2]b[1-2]", "a[[1-2]]", "[]"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="got "):
        expand_range(text)


def test_every_problem_of_ranges_and_groups_at_once_with_its_line(home: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "f",
        "targets:\n"
        "  a-[1-3]: {host: 'a-[1-4].local'}\n"
        "  b-[3-1]: {host: x}\n"
        "  c-[1-2]: {host: 'c-[1-2]', group: atic}\n"
        "  'c-[2-3]': {host: 'd-[2-3]'}\n"
        "  e: {user: pi}\n"
        "groups:\n"
        "  attic: {profile: raspberry-pi-4}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_fleet(path)
    for line, word in (
        (3, "3 targets"),
        (4, "ends before"),
        (5, "did you mean attic"),
        (6, "second target named 'c-2'"),
        (7, "host"),
        (9, "raspberry-pi-4b"),
    ):
        assert any(p.startswith(f"{path}:{line}: ") and word in p for p in caught.value.problems), (line, caught.value.problems)


def test_one_of_a_range_is_not_removed_alone_and_not_added_twice(home: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f", ATTIC)
    with pytest.raises(UsageError, match="one of a range"):
        remove_target(path, "pi-10")
    with pytest.raises(UsageError, match="exists already"):
        add_target(path, make_target(name="pi-10", host="x"))
    remove_target(path, "pi-09")
    assert load_fleet(path).targets[2].profile == "raspberry-pi-4b"
    remove_target(path, "kitchen")
    add_target(path, make_target(name="new", host="192.0.2.2"))
    assert [t.name for t in load_fleet(path).targets] == ["pi-08", "pi-09", "pi-10", "pi-11", "new"]


def test_what_stays_as_one_of_a_range_is_not_said_to_be_forgotten(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "f", ATTIC)
    assert run_cli(["--fleet", str(path), "target", "remove", "pi-09", "kitchen"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "pi-09: what was said of it alone is forgotten; it stays a target" in said and "kitchen: forgotten here" in said


# ---- large files -----------------------------------------------------------------------------------------------------


def large(count: int) -> str:
    lines = ["groups:", "  lab:", "    user: pi", "    profile: raspberry-pi-4b", "targets:"]
    for i in range(count):
        lines += [f"  box-{i:05d}:", f"    host: 10.0.{i // 256}.{i % 256}", "    group: lab", f"    tags: [rack-{i % 40}]"]
    return "\n".join(lines) + "\n"


def count_calls(path: Path) -> Counter[str]:
    """Python functions called while the file is read, by name: work, whatever else this machine does meanwhile."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            calls[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        load_fleet(path)
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_grows_with_the_lines_and_not_faster(home: Path, tmp_path: Path) -> None:
    load_fleet(write(tmp_path / "warm", large(1)))
    small, big = (count_calls(write(tmp_path / f"f{n}", large(n))) for n in (150, 600))
    assert big.total() / small.total() < 4.4, "four times the lines are more than four times the work"
    # What does not depend on the number of targets is done as often for many as for few.
    assert big["list_profiles"] == small["list_profiles"] and big["load_profile"] == small["load_profile"]


def test_ten_thousand_lines_are_read_whole_and_wrong_ones_named(home: Path, tmp_path: Path) -> None:
    text = large(2499)
    fleet = load_fleet(write(tmp_path / "f", text))
    assert len(text.splitlines()) + 1 >= 10_000 and len(fleet.targets) == 2499
    assert [t.name for t in select(fleet, ["tag:rack-7"])] == [f"box-{i:05d}" for i in range(7, 2499, 40)]
    with pytest.raises(UnknownName, match=r"no tag named 'rack-99'.*did you mean rack-9"):
        select(fleet, ["tag:rack-99"])
