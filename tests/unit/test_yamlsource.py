"""Reading and validating YAML: every problem at once, with file and line, in plain words, and nothing but ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgevit.errors import ConfigError
from edgevit.yamlsource import MAX_BYTES, load_yaml, parse_yaml, validate


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prune(Model):
    step: Literal["prune"]
    ratio: float = Field(gt=0, lt=1)


class Quantize(Model):
    step: Literal["quantize"]
    bits: int = Field(ge=2, le=8)
    scheme: Literal["dynamic", "static"] = "dynamic"
    threads: int | Literal["auto"] = "auto"


class Sheet(Model):
    name: str = Field(pattern=r"[a-z-]+")
    steps: tuple[Annotated[Prune | Quantize, Field(discriminator="step")], ...] = Field(min_length=1)
    weights: Path | None = None
    counts: dict[str, int] = {}

    @model_validator(mode="after")
    def check_counts(self) -> Sheet:
        if "total" in self.counts:
            raise ValueError("'total' is reserved")
        return self


GOOD = """\
name: small
steps:
- step: quantize   # a comment
  bits: 8
- step: prune
  ratio: 0.5
counts: {a: 1, b: 2}
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(parse_yaml(text, "f.yaml"), Sheet)
    return list(caught.value.problems)


def test_a_good_file_becomes_the_model_and_knows_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD + "weights: some/file\n")
    document = load_yaml(path)
    sheet = validate(document, Sheet)
    assert sheet.steps == (Quantize(step="quantize", bits=8), Prune(step="prune", ratio=0.5))
    assert sheet.weights == Path("some/file")
    assert document.line(("steps", 1, "ratio")) == 6
    assert document.line(("steps", 1, "absent")) == 5, "an absent key is shown at its nearest parent"
    assert document.problem(("counts", "b"), "odd") == f"{path}:7: counts.b: odd"


def test_every_problem_is_reported_at_once_with_line_and_suggestion() -> None:
    found = problems(
        "nmae: small\nsteps:\n- step: quantize\n  bits: '8'\n  scheme: dinamic\n  threads: many\n- step: prune\n  ratio: 1\n"
        "  ratoi: 2\n- step: qantize\n- bits: 3\ncounts: {a: x}\n"
    )
    assert found == [
        "f.yaml:1: name: this key is missing",
        "f.yaml:1: nmae: unknown key; did you mean 'name'?",
        "f.yaml:4: steps[0].bits: got the text '8', expected a whole number",
        "f.yaml:5: steps[0].scheme: got the text 'dinamic', expected one of dynamic, static; did you mean 'dynamic'?",
        "f.yaml:6: steps[0].threads: got the text 'many', expected a whole number or 'auto'",
        "f.yaml:8: steps[1].ratio: got 1, expected less than 1.0",
        "f.yaml:9: steps[1].ratoi: unknown key; did you mean 'ratio'?",
        "f.yaml:10: steps[2].step: got the text 'qantize', expected one of prune, quantize; did you mean 'quantize'?",
        "f.yaml:11: steps[3].step: this key is missing",
        "f.yaml:12: counts.a: got the text 'x', expected a whole number",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "f.yaml:1: the file is empty"),
        ("# nothing\n", "f.yaml:1: the file is empty"),
        ("- 1\n", "f.yaml:1: got a list, expected a mapping (key: value lines)"),
        ("name: x\n\tsteps: []\n", "f.yaml:2: a tab stands where YAML wants spaces; indent with spaces"),
        ("name: x\nname: y\n", "f.yaml:2: name: this key stands twice; the first is on line 1"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: a second document starts here; expected one document in the file"),
        ("a: *b\n", "f.yaml:1: no anchor is defined for the alias 'b'"),
        ("a: &a [*a]\n", "f.yaml:1: nested deeper than 32 levels"),
        ("[" * 3000, "f.yaml: nested deeper than 32 levels"),
        ("<<: {a: 1}\n", "f.yaml:1: merge keys (<<) are not supported"),
        ("010: x\n", "f.yaml:1: a key (010) that is not a text; write '010' in quotes"),
        ("3.8: x\n", "f.yaml:1: a key (3.8) that is not a text; write '3.8' in quotes"),
        ("a: \x01\n", "f.yaml:1: the character U+0001 cannot stand in a YAML file"),
        ("x:\n  a: .nan\n", "f.yaml:2: x.a: '.nan': .nan is not a finite number"),
        (
            "a: !!python/object:os.system x\n",
            "f.yaml:1: a: the tag tag:yaml.org,2002:python/object:os.system is not understood",
        ),
        (GOOD.replace("b: 2", "total: 2"), "f.yaml:1: 'total' is reserved"),
    ],
)
def test_one_problem(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_an_alias_is_fine_and_an_alias_bomb_is_refused() -> None:
    shared = "name: small\nsteps:\n- &s {step: prune, ratio: 0.5}\n- *s\n"
    assert len(validate(parse_yaml(shared, "f.yaml"), Sheet).steps) == 2
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n"
    for previous, name in zip("abcdefg", "bcdefgh", strict=True):
        bomb += f"{name}: &{name} [{','.join(['*' + previous] * 9)}]\n"
    assert problems(bomb) == ["f.yaml: unfolds to more than 20,000 values; are aliases nested in aliases?"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, data, expected in (
        ("latin.yaml", "a: 1\nb: é\n".encode("latin-1"), ":2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("large.yaml", b"a: 1\n" * MAX_BYTES, f": more than {MAX_BYTES:,} bytes; a configuration file has at most that"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            load_yaml(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}{expected}"
    for absent in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_yaml(absent)


def test_yaml_1_2_rules_no_is_a_text_and_dates_stay_texts() -> None:
    assert parse_yaml("a: no\nb: 2024-01-02\nc: 0o17\nd: ~\ne: true\n", "f.yaml").value == {
        "a": "no",
        "b": "2024-01-02",
        "c": 15,
        "d": None,
        "e": True,
    }


BITS = st.sampled_from(
    ["\t", "- ", ": ", "{", "}", "[", "]", "&a ", "*a", "!", "!!int ", "'", '"', "\n", "  ", "#", "|", ">", "?"]
)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), st.one_of(BITS, st.text(max_size=6), st.integers().map(str))),
        min_size=1,
        max_size=4,
    )
)
def test_any_mutation_gives_a_model_or_a_config_error(edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for at, drop, insert in edits:
        text = text[:at] + insert + text[at + drop :]
    try:
        sheet = validate(parse_yaml(text, "f.yaml"), Sheet)
    except ConfigError as e:
        assert e.problems
        assert all(p.startswith("f.yaml") for p in e.problems), e.problems
    else:
        assert isinstance(sheet, Sheet)
