from __future__ import annotations

from typing import Any

import pytest

from quantempo.contracts.codec import canonical_json, from_data, parse_json
from quantempo.errors import PlanError, UnknownKey
from quantempo.recipe import Recipe


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(groups="optimal:8", guidance=(1.5, 4.0), keep=("*.ff.*",), classes=(1, 2), activation_bits=6)
    assert from_data(Recipe, parse_json(canonical_json(recipe), "recipe"), "recipe") == recipe


def test_a_default_recipe_is_written_as_nothing_and_read_as_itself() -> None:
    assert canonical_json(Recipe()) == "{}\n"
    assert from_data(Recipe, {}, "recipe") == Recipe()


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(UnknownKey, match=r"recipe\.group: found an unknown key 'group'.*\n.*\n.*did you mean 'groups'"):
        from_data(Recipe, {"group": "auto"}, "recipe")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("precision", "int4", "int8 or fp8 or float32"), ("weight_method", "max", "gptq or mse or minmax"), 
        ("activation_bits", 1, "2 to 8"), ("activation_bits", 9, "2 to 8"), ("steps", (), "at least one positive"),
        ("steps", (20, 0), "at least one positive"), ("guidance", (), "at least one scale"),
        ("guidance", (1.0, -0.5), "at least one scale"), ("samples", 0, "at least one sample"),
        ("batch", 0, "a batch of at least 1"), ("max_steps", 0, "at least 1"), ("seed", -1, "0 or more"),
        ("threads", -2, "0 or more"),
    ],
)
def test_values_that_mean_nothing_are_refused(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(PlanError, match=f"(?s)recipe, .*wanted .*{wanted}.*Likely cause.*Next step"):
        Recipe(**{field: value})
