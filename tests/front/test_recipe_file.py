from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from quantempo.contracts.codec import canonical_json
from quantempo.contracts.plan import Keep, Rule
from quantempo.demo import DEMO_RECIPE
from quantempo.errors import DataError, PlanError, QuantempoError, RequestError, UnknownKey
from quantempo.inspection import load_plan
from quantempo.recipe import Recipe
from quantempo.recipe_file import read_recipe

EXAMPLE = """\
version: 1
groups: optimal:8
guidance: 1.5..7.5        # four scales
steps: [20, 50]
schedulers: [schedulers/euler]
keep: ["*.attn1.to_out.0"]
rules:
  - {match: "*.ff.*", activation_bits: 6}
  - {match: "transformer_blocks.0.*", action: keep, reason: first block}
"""


def written(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_holds_the_fields_of_a_recipe(tmp_path: Path) -> None:
    assert read_recipe([written(tmp_path, EXAMPLE)]) == Recipe(
        groups="optimal:8", guidance=(1.5, 3.5, 5.5, 7.5), steps=(20, 50), keep=("*.attn1.to_out.0",),
        schedulers=(str(tmp_path / "schedulers/euler"),),
        rules=(Rule("*.ff.*", activation_bits=6), Rule("transformer_blocks.0.*", "keep", reason="first block")),
    )


def test_what_a_bundle_holds_can_be_used_again(tmp_path: Path) -> None:
    assert read_recipe([written(tmp_path, canonical_json(DEMO_RECIPE), "recipe.json")]) == DEMO_RECIPE
    assert read_recipe([written(tmp_path, "", "empty.yaml")]) == Recipe()
    assert read_recipe([]) == Recipe()


def test_later_files_and_flags_win_and_rules_add_up(tmp_path: Path) -> None:
    first = written(tmp_path, EXAMPLE)
    second = written(tmp_path, "groups: single\nrules: [{match: 'a', weight_bits: 4}]\n", "b.yml")
    found = read_recipe([first, second], {"samples": 12, "keep": ("x",)})
    assert (found.groups, found.samples, found.keep) == ("single", 12, ("x",))
    assert [rule.match for rule in found.rules] == ["*.ff.*", "transformer_blocks.0.*", "a"]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("group: auto", UnknownKey, ("recipe.yaml.group", "did you mean 'groups'?")),
        ("rules: [{mach: a}]", UnknownKey, ("recipe.yaml.rules[0].mach", "did you mean 'match'?")),
        ("samples: many", DataError, ("recipe.yaml.samples", "a value of type int")),
        ("samples: 0", PlanError, ("recipe, samples", "at least one sample")),
        ("rules: [{match: a, action: float}]", DataError, ("'keep', 'quantize'",)),
        ("rules: [{match: a, weight_bits: 9}]", PlanError, ("weight_bits", "2 to 8")),
        ("version: 2", PlanError, ("recipe, version", "at most 1", "upgrade")),
        ("guidance: 7..1", RequestError, ("upside down", "1..7")),
        ("- a\n- b", DataError, ("list at its top",)),
        ("a: [1", DataError, ("text that is not YAML",)),
        ("groups: auto\nseed: 1\ngroups: single", DataError, ("the key 'groups' twice (line 3)",)),
        ("x: !!python/object/apply:os.system [ls]", DataError, ("not YAML",)),
    ],
)
def test_slips_are_named(tmp_path: Path, text: str, kind: type[QuantempoError], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        read_recipe([written(tmp_path, text)])
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such file"):
        read_recipe([tmp_path / "recipe.yaml"])


# ------------------------------------------------------------------------------------------------- rules in a plan


def decisions(compile_tiny: Any, out: Path, *rules: Rule, **changes: Any) -> Any:
    plan = load_plan(compile_tiny(out, rules=rules, **changes).bundle)
    assert plan is not None
    return plan


def test_the_later_of_two_rules_wins(compile_tiny: Any, tmp_path: Path) -> None:
    plan = decisions(
        compile_tiny, tmp_path / "a", Rule("transformer_blocks.*", "keep", reason="all"),
        Rule("*.ff.net.2", "quantize", weight_bits=4), Rule("transformer_blocks.1.*", weight_bits=6),
    )
    for site in plan.sites:
        settings = plan.settings(site)
        if site.module.endswith("ff.net.2"):
            assert settings.weight_bits == (6 if ".1." in site.module else 4)
        elif site.module.startswith("transformer_blocks"):
            assert plan.decisions[site.id] == Keep("all")


def test_keep_wins_over_rules_and_a_rule_over_the_defaults(compile_tiny: Any, tmp_path: Path) -> None:
    plan = decisions(compile_tiny, tmp_path / "a", Rule("proj_out_2", "quantize"))
    assert plan.settings(next(s for s in plan.sites if s.module == "proj_out_2")) is not None
    plan = decisions(compile_tiny, tmp_path / "b", Rule("*.ff.*", "quantize"), keep=("*.ff.net.2",))
    kept = {site.module for site in plan.kept() if ".ff." in site.module}
    assert kept == {f"transformer_blocks.{i}.ff.net.2" for i in range(2)}


def test_sites_that_share_a_tensor_share_its_bits(compile_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"(?s)to_(k|q|v)'.*both read one tensor.*give both the same activation_bits"):
        decisions(compile_tiny, tmp_path / "a", Rule("transformer_blocks.0.attn1.to_q", activation_bits=6))
    plan = decisions(compile_tiny, tmp_path / "b", Rule("transformer_blocks.0.attn1.to_q", weight_bits=6))
    bits = {site.module: plan.settings(site).weight_bits for site in plan.quantized()}
    assert bits["transformer_blocks.0.attn1.to_q"] == 6
    assert bits["transformer_blocks.0.attn1.to_k"] == 8


def test_a_rule_that_matches_nothing_is_an_error(compile_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="did you mean"):
        decisions(compile_tiny, tmp_path / "a", Rule("transformer_blocks.0.attn1.to_qq", weight_bits=6))


def test_the_command_takes_recipe_files(cli: Any, tmp_path: Path) -> None:
    recipe = written(tmp_path, "samples: 8\nbatch: 4\nsteps: [4]\nguidance: [1.5]\nmax_steps: 6\nthreads: 1\n")
    out = tmp_path / "bundle"
    code, _, err = cli("compile", tiny_models.dit_pipeline(), "-o", out, "--recipe", recipe, "--groups", "single")
    assert code == 0, err
    data = json.loads((out / "recipe.json").read_text())
    assert data == {
        "samples": 8, "batch": 4, "steps": [4], "guidance": [1.5], "max_steps": 6, "threads": 1, "groups": "single"
    }
    recipe.write_text("sample: 8\n")
    code, _, err = cli("compile", tiny_models.dit_pipeline(), "-o", tmp_path / "b", "--recipe", recipe)
    assert code == 1
    assert "did you mean 'samples'?" in err
