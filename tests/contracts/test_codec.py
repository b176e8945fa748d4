from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union

import pytest

from quantempo.contracts.codec import canonical_json, digest, from_data, parse_json, to_data
from quantempo.contracts.plan import Keep, Quantize, QuantPlan, Share, Site
from quantempo.errors import DataError, UnknownKey


@dataclass(frozen=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float


@dataclass(frozen=True)
class Square:
    kind: ClassVar[str] = "square"
    side: float
    colour: Literal["red", "blue"] = "red"


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Union[Circle, Square], ...]
    size: tuple[int, str]
    names: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None
    shown: bool = True
    anything: Any = None


DRAWING = Drawing((Circle(1.5), Square(2.0, "blue")), (3, "x"), {"b": 1, "a": 2}, "hi", False, {"k": [1]})


def test_round_trip_through_text() -> None:
    assert from_data(Drawing, json.loads(canonical_json(DRAWING)), "d") == DRAWING


def test_defaults_are_left_out_and_come_back() -> None:
    plain = Drawing((), (1, "y"))
    assert to_data(plain) == {"shapes": [], "size": [1, "y"]}
    assert from_data(Drawing, to_data(plain), "d") == plain


def test_text_does_not_depend_on_insertion_order() -> None:
    turned = Drawing(DRAWING.shapes, DRAWING.size, {"a": 2, "b": 1}, "hi", False, {"k": [1]})
    assert canonical_json(turned) == canonical_json(DRAWING)
    assert canonical_json(DRAWING).endswith("}\n")


def test_long_values_break_into_lines_and_short_lists_do_not() -> None:
    text = canonical_json({"long": list(range(60)), "short": [1, 2]})
    assert '"short": [1, 2]\n' in text
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads(text) == {"long": list(range(60)), "short": [1, 2]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON cannot hold"):
        canonical_json({"x": value})


def _drawing(**changes: Any) -> dict[str, Any]:
    return {**to_data(DRAWING), **changes}


def test_an_unknown_key_names_its_place_and_the_nearest_key() -> None:
    with pytest.raises(UnknownKey, match=r"d\.shappes[\s\S]*did you mean 'shapes'"):
        from_data(Drawing, _drawing(shappes=[]), "d")
    with pytest.raises(UnknownKey, match=r"d\.shapes\[0\]\.radios"):
        from_data(Drawing, _drawing(shapes=[{"kind": "circle", "radios": 1}]), "d")


def test_a_missing_key_names_its_place() -> None:
    with pytest.raises(DataError, match=r"d\.size: found no such key"):
        from_data(Drawing, {"shapes": []}, "d")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"size": [1]}, r"d\.size: found \[1\], wanted a list of 2 items"),
        ({"size": ["1", "x"]}, r"d\.size\[0\].*type int"),
        ({"size": [True, "x"]}, r"d\.size\[0\].*type int"),
        ({"shapes": {}}, r"d\.shapes.*a list"),
        ({"shapes": [{"kind": "circel", "radius": 1}]}, r"d\.shapes\[0\][\s\S]*did you mean 'circle'"),
        ({"shapes": [{"kind": "square", "side": 1, "colour": "green"}]}, "one of 'red', 'blue'"),
        ({"names": [1]}, r"d\.names.*an object"),
        ({"names": {"a": "b"}}, r"d\.names\.a.*type int"),
        ({"note": 3}, r"d\.note.*str"),
        ({"shown": 1}, r"d\.shown.*type bool"),
    ],
)
def test_a_value_of_another_type_names_its_place(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError, match=place):
        from_data(Drawing, _drawing(**changes), "d")


def test_whole_numbers_are_legal_floats_but_not_the_reverse() -> None:
    assert from_data(Circle, {"kind": "circle", "radius": 2}, "c") == Circle(2.0)
    with pytest.raises(DataError, match=r"d\.size\[0\]"):
        from_data(Drawing, _drawing(size=[1.5, "x"]), "d")


def test_text_that_is_not_json_is_named() -> None:
    with pytest.raises(DataError, match=r"plan\.json: found text that is not JSON"):
        parse_json("{", "plan.json")


def test_a_plan_with_all_kinds_of_decisions_round_trips() -> None:
    sites = tuple(
        Site(name, "full", "conv" if name == "c" else "matmul", f"x{name}", f"y{name}", f"w{name}", name, 8, 8, 3)
        for name in "abc"
    )
    plan = QuantPlan("0" * 64, sites, {"a": Quantize(activation_bits=6), "b": Share("a"), "c": Keep("first layer")})
    back = from_data(QuantPlan, json.loads(canonical_json(plan)), "plan")
    assert back == plan
    assert canonical_json(back) == canonical_json(plan)


def test_digest_is_that_of_the_bytes() -> None:
    assert digest("abc") == digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
