from __future__ import annotations

from pathlib import Path

import pytest

from edgevit.errors import ConfigError, UnknownName, UsageError
from edgevit.fleet.inventory import Target, add_target, load_fleet, local_target, make_target, remove_target, select
from edgevit.transport.hostkeys import HostKey, pin

MAPPED = """\
# the lab's boxes
schema: edgevit.fleet/1
targets:
  kitchen:   # beside the kettle
    host: 192.0.2.1
    user: pi
    profile: raspberry-pi-4b
    tags: [lab, hot]
  attic:
    host: attic.lab
    port: 2222
    jump: me@gate:22
    python: python3.9
"""

LISTED = """\
schema: edgevit.fleet/1
targets:
  - name: one
    host: 192.0.2.1
  - name: two
    host: 192.0.2.2
    tags: [lab]
"""


@pytest.fixture
def fleet_file(home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(MAPPED)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_both_forms_are_read(fleet_file: Path, tmp_path: Path) -> None:
    kitchen, attic = load_fleet(fleet_file).targets
    assert (kitchen.name, kitchen.host, kitchen.profile, kitchen.tags) == (
        "kitchen",
        "192.0.2.1",
        "raspberry-pi-4b",
        ("lab", "hot"),
    )
    assert (attic.port, attic.jump, attic.python, attic.root) == (2222, "me@gate:22", "python3.9", "~/.edgevit")
    assert [t.name for t in load_fleet(write(tmp_path / "listed", LISTED)).targets] == ["one", "two"]


def test_no_file_and_an_empty_one_hold_no_target(home: Path, tmp_path: Path) -> None:
    assert load_fleet(tmp_path / "absent").targets == ()
    assert load_fleet(write(tmp_path / "empty", "\n")).targets == ()
    assert load_fleet(write(tmp_path / "none", "schema: edgevit.fleet/1\ntargets: {}\n")).targets == ()


def test_every_problem_is_said_at_once_with_its_line(home: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "schema: edgevit.fleet/1\n"
        "targets:\n"
        "  a:\n"
        "    hots: 192.0.2.1\n"
        "    port: 70000\n"
        "  b:\n"
        "    host: -oProxyCommand=evil\n"
        "    profile: raspberry-pi-4\n"
        "  local:\n"
        "    host: here\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_fleet(path)
    said = "\n".join(caught.value.problems)
    for line, word in ((4, "hots"), (5, "70"), (7, "host"), (8, "raspberry-pi-4b"), (9, "local")):
        assert any(p.startswith(f"{path}:{line}: ") and word in p for p in caught.value.problems), (
            f"line {line} ({word}) in {said}"
        )
    assert "did you mean" in said


def test_a_name_used_twice_is_found_in_both_forms(home: Path, tmp_path: Path) -> None:
    twice = "schema: edgevit.fleet/1\ntargets:\n  - {name: a, host: x}\n  - {name: a, host: y}\n"
    with pytest.raises(ConfigError, match=r":4: .*second target named 'a'"):
        load_fleet(write(tmp_path / "l", twice))
    with pytest.raises(ConfigError):
        load_fleet(write(tmp_path / "m", "schema: edgevit.fleet/1\ntargets:\n  a: {host: x}\n  a: {host: y}\n"))


@pytest.mark.parametrize(
    "text", ["targets: {}\n", "schema: edgevit.fleet/2\ntargets: {}\n", "- a\n", "schema: edgevit.fleet/1\ntargets: 3\n"]
)
def test_other_documents_are_refused(home: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_fleet(write(tmp_path / "f", text))


def test_selection(fleet_file: Path) -> None:
    fleet = load_fleet(fleet_file)

    def names(*patterns: str) -> list[str]:
        return [t.name for t in select(fleet, patterns)]

    assert names("attic", "kitchen", "attic") == ["kitchen", "attic"]
    assert names("a*") == ["attic"]
    assert names("tag:lab") == ["kitchen"]
    assert names("profile:raspberry-pi-4b") == ["kitchen"]
    assert names("local") == ["local"]
    assert names("*") == ["local", "kitchen", "attic"]
    for empty in ((), ("tag:none",), ("zz*",), ("profile:jetson-nano",)):
        with pytest.raises(UsageError):
            names(*empty)
    with pytest.raises(UnknownName, match="no tag named 'none'; known: hot, lab"):
        names("kitchen", "tag:none")
    with pytest.raises(UsageError, match="no target matches"):
        names("kitchen", "profile:jetson-nano")
    with pytest.raises(UnknownName, match="did you mean kitchen"):
        names("kitchn")


def test_a_range_selects_what_it_stands_for_in_the_fleet_file(home: Path, tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path / "f", "schema: edgevit.fleet/1\ntargets:\n  pi-[1-40]:\n    host: pi-[1-40].lab\n"))
    assert [t.name for t in select(fleet, ["pi-[1-40]"])] == [f"pi-{n}" for n in range(1, 41)]
    assert [t.name for t in select(fleet, ["pi-[9-11]", "pi-[2-3]"])] == ["pi-2", "pi-3", "pi-9", "pi-10", "pi-11"]
    assert [t.name for t in select(fleet, ["*-[1-2]?"])] == [f"pi-{n}" for n in range(10, 30)]
    assert [t.name for t in select(fleet, ["pi-[23]"])] == ["pi-2", "pi-3"], "any other set is of single characters"
    with pytest.raises(UsageError, match="no target matches"):
        select(fleet, ["pi-[41-50]"])


def test_local_is_this_machine_under_this_python(home: Path) -> None:
    import sys

    local = local_target()
    assert local.is_local
    assert local.python == sys.executable
    assert local.root.startswith(str(home))


def test_adding_and_removing_keep_what_a_person_wrote(fleet_file: Path) -> None:
    add_target(fleet_file, make_target(name="cellar", host="192.0.2.9", tags=("wet",), port=2200))
    text = fleet_file.read_text()
    assert text.startswith(MAPPED.rstrip("\n"))
    assert fleet_file.stat().st_mode & 0o777 == 0o600
    assert load_fleet(fleet_file).targets[-1] == Target(name="cellar", host="192.0.2.9", tags=("wet",), port=2200)
    with pytest.raises(UsageError, match="exists already"):
        add_target(fleet_file, make_target(name="cellar", host="x"))
    remove_target(fleet_file, "cellar")
    assert fleet_file.read_text() == MAPPED
    remove_target(fleet_file, "attic")
    assert "# beside the kettle" in fleet_file.read_text()
    with pytest.raises(UnknownName):
        remove_target(fleet_file, "attic")


def test_the_list_form_stays_a_list(home: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f", LISTED)
    add_target(path, make_target(name="three", host="192.0.2.3"))
    assert [t.name for t in load_fleet(path).targets] == ["one", "two", "three"]
    assert path.read_text().startswith(LISTED.rstrip("\n"))
    remove_target(path, "one")
    assert [t.name for t in load_fleet(path).targets] == ["two", "three"]


def test_the_first_target_makes_the_file_and_the_last_leaves_it_readable(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "fleet.yaml"
    add_target(path, make_target(name="a", host="x"))
    assert [t.name for t in load_fleet(path).targets] == ["a"]
    remove_target(path, "a")
    assert load_fleet(path).targets == ()
    add_target(path, make_target(name="b", host="y"))
    assert [t.name for t in load_fleet(path).targets] == ["b"]


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "-x"},
        {"host": "a b"},
        {"port": 0},
        {"user": "-l"},
        {"python": "-c"},
        {"python": "python3\nreboot"},
        {"root": "relative"},
        {"jump": "-J"},
        {"name": "a/b"},
        {"tags": ("a b",)},
    ],
)
def test_settings_that_could_be_options_or_paths_elsewhere_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_target(**{"name": "a", "host": "x", **settings})


@pytest.mark.parametrize("what", ["fleet file", "host keys"])
def test_a_folder_that_cannot_be_written_is_named(home: Path, tmp_path: Path, what: str) -> None:
    """Such as one that an earlier command made as root; here a file stands in its place."""
    (tmp_path / "config").write_text("")
    place = tmp_path / "config" / "sub" / "file"
    with pytest.raises(UsageError, match=r"config/sub/file: .*cannot be (written|kept): Not a directory") as caught:
        if what == "fleet file":
            add_target(place, make_target(name="pi", host="192.0.2.1"))
        else:
            pin(place, "192.0.2.1", 22, HostKey("ssh-ed25519", b"key"))
    assert f"ls -ld {place.parent}" in caught.value.hint
