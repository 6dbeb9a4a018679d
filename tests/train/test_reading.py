"""The reader that recipes go through, on a schema of its own."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from train.reading import ConfigError, override, parse_override, read, require, write


@dataclass(frozen=True)
class Round:
    radius: float
    kind: Literal["round"] = "round"


@dataclass(frozen=True)
class Square:
    side: float = 1.0
    kind: Literal["square"] = "square"


@dataclass(frozen=True)
class Grey:
    kind: Literal["grey"] = "grey"
    implied: ClassVar[bool] = True


@dataclass(frozen=True)
class Box:
    limits: tuple[float, float] = (0.0, math.inf)
    count: int = 1
    open: bool = False
    label: str | None = None
    mode: Literal["fast", "slow"] = "fast"
    folder: Path = Path(".")
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.count > 0, "count", self.count, "a positive integer")


@dataclass(frozen=True)
class Root:
    name: str
    box: Box = Box()
    shape: Round | Square | None = None
    shapes: tuple[Round | Square, ...] = ()
    by_letter: dict[str, Round | Square] | None = None
    inner: Square = Square()
    colour: Square | Grey = Square()


def problem(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        read(Root, {"name": "x"} | values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_reads_back_equal():
    full = Root(
        name="x",
        box=Box(limits=(0.5, math.inf), count=3, open=True, mode="slow", folder=Path("a/b"), names=("p", "q")),
        shape=Round(2.0),
        shapes=(Square(3.0), Round(1.0)),
    )
    plain = write(full)
    assert plain["box"]["limits"] == [0.5, "inf"]
    assert read(Root, plain) == full


def test_a_whole_number_is_taken_where_a_number_is_wanted():
    side = read(Root, {"name": "x", "inner": {"side": 2}}).inner.side
    assert side == 2.0
    assert isinstance(side, float)


@pytest.mark.parametrize(
    ("key", "value", "wants"),
    [
        ("count", "3", "an integer"),
        ("count", 3.0, "an integer"),
        ("count", True, "an integer"),
        ("open", 1, "true or false"),
        ("open", "true", "true or false"),
        ("label", 3, "a string or none"),
        ("mode", "medium", "one of fast, slow"),
        ("folder", 3, "a path as a string"),
        ("limits", [1.0], "a list of 2, each a number"),
        ("limits", [1.0, "2"], "a list of 2, each a number"),
        ("limits", [1.0, math.nan], "a list of 2, each a number"),
        ("names", ["a", 1], "a list, each a string"),
    ],
)
def test_no_value_is_coerced_silently(key: str, value: object, wants: str):
    assert problem({"box": {key: value}}) == f"box.{key}: got {value!r}, wants {wants}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_must_be_finite(value: float):
    assert problem({"inner": {"side": value}}) == f"inner.side: got {value!r}, wants a number"


def test_none_is_written_as_a_word():
    assert read(Root, {"name": "x", "box": {"label": "none"}, "shape": "none"}) == Root("x")


def test_an_unknown_key_names_the_nearest():
    assert problem({"box": {"cuont": 1}}) == "box.cuont: unknown key; did you mean box.count?"
    assert problem({"bx": {}}) == "bx: unknown key; did you mean box?"


def test_a_key_of_another_section_is_found_there():
    assert problem({"box": {"side": 1.0}}) == "box.side: unknown key; did you mean shape.side?"
    assert problem({"radius": 1.0}) == "radius: unknown key; did you mean shape.radius?"


def test_an_unknown_key_like_none_lists_what_there_is():
    assert problem({"inner": {"zzz": 1}}) == "inner.zzz: unknown key; inner has side, kind"


def test_a_tagged_union_is_told_apart_by_its_kind():
    assert read(Root, {"name": "x", "shape": {"kind": "square", "side": 2.0}}).shape == Square(2.0)
    assert problem({"shape": {}}) == "shape.kind: missing, wants one of round, square"
    assert problem({"shape": {"kind": "rond"}}) == (
        "shape.kind: got 'rond', wants one of round, square; did you mean round?"
    )
    assert problem({"shape": {"kind": "round"}}) == "shape.radius: missing, wants a number"
    assert read(Root, {"name": "x", "colour": {}}).colour == Grey(), "one kind may be meant where none is named"
    assert problem({"shape": {"kind": ["round"]}}).startswith("shape.kind: got ['round'], wants one of")
    assert "shapes[1].radius: got 'a'" in problem({"shapes": [{"kind": "square"}, {"kind": "round", "radius": "a"}]})
    assert "by_letter.M.radius: missing" in problem({"by_letter": {"M": {"kind": "round"}}})


def test_a_section_must_be_a_table():
    assert problem({"box": 3}) == "box: got 3, wants a table"


def test_a_complaint_of_the_dataclass_is_put_under_its_section():
    assert problem({"box": {"count": 0}}) == "box.count: got 0, wants a positive integer"


def test_overrides_are_toml_values_and_else_strings():
    assert parse_override("a.b=1_000") == ("a.b", 1000)
    assert parse_override("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_override('a.b={kind="round"}') == ("a.b", {"kind": "round"})
    assert parse_override("a.b=some words=x") == ("a.b", "some words=x")
    assert parse_override("a.b=1\nc=2") == ("a.b", "1\nc=2")


@pytest.mark.parametrize("text", ["a.b", "=3", "a..b=3", ".a=3"])
def test_an_override_without_a_key_and_a_value_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"command line: got .*, wants section.key=value"):
        parse_override(text)


def test_an_override_makes_the_tables_on_its_way():
    values: dict = {"a": {"b": 1}}
    override(values, "a.c", 2)
    override(values, "d.e.f", 3)
    assert values == {"a": {"b": 1, "c": 2}, "d": {"e": {"f": 3}}}
    with pytest.raises(ConfigError, match="a.b is a single value"):
        override(values, "a.b.c", 4)
