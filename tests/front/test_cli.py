from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_models
from support.bundle_maker import Shape, make_bundle

import quantempo
from quantempo import demo as demo_module
from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.plan import Rule
from quantempo.inspection import describe, render
from quantempo.recipe import Recipe
from quantempo.runtime.bundle import OpenBundle, read_bundle

COMMANDS = ("compile", "plan", "stages", "sample", "inspect", "report", "demo")
QUICK = ("--samples", 32, "--steps", "4,5", "--guidance", "1.5", "--threads", 1)


def test_every_command_explains_itself(cli: Any) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out
        code, help_text, _ = cli(command, "--help")
        assert code == 0
        assert "Usage: quantempo " + command in help_text


def test_without_a_command_the_help_is_shown_and_nothing_is_done(cli: Any) -> None:
    code, out, err = cli()
    assert code == 2
    assert "Usage: quantempo" in out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("compile",), "Missing argument"),
        (("compile", "model"), "Missing option '--out'"),
        (("compile", "model", "-o", "out", "--steps", "4.5"), "not a comma-separated list of whole numbers"),
        (("compile", "model", "-o", "out", "--seed", "x"), "valid integer"),
        (("sample", "b", "-o", "x.png", "--rng", "dice"), "'dice' is not one of 'philox', 'torch-cpu'"),
        (("inspect", "b", "--jsno"), "No such option: --jsno"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(cli: Any, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())


def test_our_errors_end_with_1_in_five_parts_and_without_a_traceback(cli: Any, tmp_path: Path) -> None:
    code, out, err = cli("compile", tmp_path / "nothing", "-o", tmp_path / "out")
    assert code == 1
    assert out == ""
    assert err.startswith(f"NotAModelDirectory: {tmp_path / 'nothing'}: found no such directory, wanted a local")
    assert "Likely cause:" in err
    assert "Next step:" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--dtype", "int4"), "recipe, precision: found 'int4', wanted int8 or fp8 or float32"),
        (("--activation-bits", "12"), "recipe, activation_bits: found 12, wanted 2 to 8"),
        (("--groups", "many"), "groups: found 'many'"),
        (("--range-method", "magic"), "'magic'"),
        (("--guidance=-1",), "recipe, guidance"),
        (("--guidance", "high"), "guidance: found high, wanted numbers"),
        (("--guidance", "7..1.5"), "the range is upside down"),
        (("--selection", "unifrom:0.5"), "did you mean 'uniform'?"),
        (("--calib-set", "missing.npz"), "calibration set missing.npz: found no such file"),
        (("--recipe", "missing.yaml"), "recipe missing.yaml: found no such file"),
        (("--plan", "missing.json"), "plan missing.json: found no such file"),
        # What a program would take for "not given" is a value like any other.
        (("--samples", "0"), "recipe, samples: found 0, wanted at least one sample"),
        (("--batch", "0"), "wanted at least one sample and a batch of at least 1"),
        (("--max-steps", "0"), "recipe, max_steps: found 0, wanted at least 1"),
        (("--activation-bits", "0"), "recipe, activation_bits: found 0, wanted 2 to 8"),
        (("--seed", "-1"), "recipe, seed: found -1, wanted 0 or more"),
        (("--dtype", ""), "recipe, precision: found ''"),
        (("--groups", ""), "groups: found ''"),
        (("--guidance", ""), "guidance: found , wanted numbers"),
        (("--rule", "{mach: a}"), "--rule.mach: found"),
        (("--rule", "*.ff.*"), "--rule: found '*.ff.*', wanted a rule as in a recipe file"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(
    cli: Any, tmp_path: Path, option: tuple[str, ...], words: str
) -> None:
    code, _, err = cli("compile", tiny_models.dit_pipeline(), "-o", tmp_path / "out", *option)
    assert code == 1
    assert words in err
    assert "trace denoiser" not in err
    assert list(tmp_path.iterdir()) == []


SET = {
    "precision": "fp8", "targets": ["t4"], "graphs": ["fp8-bf16"], "attention": "float", "groups": "single",
    "range_method": "mse", "activation_bits": 8, "centre": False, "weight_method": "mse", "samples": 9, "batch": 3,
    "guidance": [2.0], "steps": [6, 7], "schedulers": ["a"], "classes": [1, 2], "seed": 4, "selection": "single",
    "hard_cases": 0, "size": "8x8", "tokens": 5, "controlnets": ["b"], "ip_adapters": ["c"], "inputs": "d.npz",
    "code": "h.py", "calibration": "e.txt", "rules": [{"match": "x"}], "keep": ["f"], "exclude": ["g"],
    "cache": "every:2", "cache_cut": "branch:1", "cache_min_psnr": 30.0, "cache_max_ms": 9.0, "cache_steps": [6],
    "max_steps": 11,
    "default_guidance": 3.0, "reference": False, "threads": 2,
}
FLAGS = [
    ("--dtype", "fp8"), ("--target", "t4"), ("--graph", "fp8-bf16"), ("--attention", "float"), ("--groups", "single"),
    ("--range-method", "mse"), ("--activation-bits", 8), ("--no-centre",), ("--weight-method", "mse"), ("--samples", 9),
    ("--batch", 3), ("--guidance", "2"), ("--steps", "6,7"), ("--calib-scheduler", "a"), ("--class", 1), ("--class", 2),
    ("--seed", 4), ("--selection", "single"), ("--hard-cases", 0), ("--size", "8x8"), ("--tokens", 5),
    ("--controlnet", "b"), ("--ip-adapter", "c"), ("--inputs", "d.npz"), ("--code", "h.py"), ("--calib-set", "e.txt"),
    ("--rule", "{match: x}"), ("--keep", "f"), ("--exclude", "g"), ("--cache", "every:2"), ("--cache-cut", "branch:1"),
    ("--cache-min-psnr", 30), ("--max-time", 9), ("--cache-steps", "6"), ("--max-steps", 11),
    ("--default-guidance", 3), ("--no-reference",), ("--threads", 2),
]
ZEROS = {"seed": 0, "hard_cases": 0, "tokens": 0, "threads": 0, "cache_min_psnr": 0.0, "cache_max_ms": 0.0, "size": "",
         "cache_cut": "", "default_guidance": 0.0}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipes that `compile` asks for; nothing is compiled."""
    from quantempo import pipeline

    found: list[Recipe] = []

    def compile_model(model: Any, out: Any, recipe: Recipe, **options: Any) -> Any:
        found.append(recipe)
        return SimpleNamespace(text=lambda: "")

    monkeypatch.setattr(pipeline, "compile_model", compile_model)
    return found


def test_every_field_of_a_recipe_has_a_flag(cli: Any, asked: list[Recipe]) -> None:
    assert set(SET) == {field.name for field in dataclasses.fields(Recipe)} - {"version"}
    code, _, err = cli("compile", "m", "-o", "b", *(word for flag in FLAGS for word in flag))
    assert code == 0, err
    assert asked == [from_data(Recipe, SET, "recipe")]


def test_a_flag_that_is_zero_or_empty_wins_over_the_file(cli: Any, asked: list[Recipe], tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    set_before = {**{name: SET[name] for name in ZEROS}, "hard_cases": 3, "rules": SET["rules"]}
    file.write_text(json.dumps(set_before))
    code, _, err = cli("compile", "m", "-o", "b", "--recipe", file)
    assert code == 0, err
    words = [word for name, value in ZEROS.items() for word in (f"--{name}".replace("_", "-"), value)]
    words[words.index("--cache-max-ms")] = "--max-time"
    code, _, err = cli("compile", "m", "-o", "b", "--recipe", file, *words, "--rule", "{match: y, weight_bits: 4}")
    assert code == 0, err
    assert asked[0] == from_data(Recipe, set_before, "recipe")
    rules = (Rule("x"), Rule("y", weight_bits=4))
    assert asked[1] == dataclasses.replace(from_data(Recipe, ZEROS, "recipe"), rules=rules)


def test_compile_writes_a_bundle_and_sums_up(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, text, err = cli(
        "compile", tiny_models.dit_pipeline(), "-o", out, *QUICK, "--groups", "uniform:2", "--keep", "*.ff.*",
        "--activation-bits", 7, "--seed", 5, "--no-reference", "--range-method", "percentile",
    )
    assert (code, "Traceback" in err) == (0, False)
    assert f"wrote {out}" in text
    assert "2 scale groups" in text
    assert "calibrate:" in err, "stages are shown"
    recipe = from_data(Recipe, parse_json((out / "recipe.json").read_bytes(), "recipe"), "recipe")
    assert recipe == Recipe(
        samples=32, steps=(4, 5), guidance=(1.5,), threads=1, groups="uniform:2", keep=("*.ff.*",), activation_bits=7,
        seed=5, reference=False, range_method="percentile",
    )
    assert read_bundle(out).steps == tuple(range(1, 101)), "programs for 1 to 100 steps"
    code, _, err = cli("compile", tiny_models.dit_pipeline(), "-o", out, *QUICK)
    assert code == 1
    assert "OutputExists" in err
    assert "--overwrite" in err
    code, _, _ = cli("compile", tiny_models.dit_pipeline(), "-o", out, *QUICK, "--dtype", "float32", "--overwrite")
    assert code == 0
    assert read_bundle(out).manifest.precision == "float32"


def test_a_sample_without_a_class_says_which_flag_is_missing(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    code, _, err = cli("sample", dit_bundle.root, "-o", tmp_path / "a.png")
    assert code == 1
    assert "RequestError: sample, class: found no label, wanted 0 to 9, or a name" in err
    assert "add --class 0" in err


def test_sample_writes_a_grid_and_does_not_overwrite_it(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "grid.png"
    words = ("sample", dit_bundle.root, "-o", out, "--class", "3", "--class", "digit 7", "--count", 2, "--steps", 4)
    code, text, _ = cli(*words, "--seed", 9, "--threads", 1)
    assert code == 0
    assert f"wrote {out}: 4 images" in text
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        first = np.asarray(picture)
    with quantempo.load(dit_bundle.root, threads=1) as session:
        images = session(class_labels=[3, 3, 7, 7], seed=9, num_inference_steps=4).images
    height, width = np.asarray(images[0]).shape
    assert first.shape[0] >= 2 * height
    assert first.shape[1] >= 2 * width
    assert np.array_equal(first[:height, :width], np.asarray(images[0]))
    code, _, err = cli(*words)
    assert code == 1
    assert "an existing file" in err
    assert "--overwrite" in err
    code, _, _ = cli(*words, "--seed", 10, "--overwrite", "--threads", 1)
    assert code == 0
    with Image.open(out) as picture:
        assert not np.array_equal(np.asarray(picture), first)


def test_sample_with_another_scheduler(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    EulerAncestralDiscreteScheduler().save_pretrained(tmp_path / "euler")
    words = ("sample", dit_bundle.root, "-o", tmp_path / "a.png", "--class", 1, "--steps", 9, "--threads", 1)
    code, text, _ = cli(*words, "--scheduler", tmp_path / "euler", "--rng", "torch-cpu", "--guidance", 2)
    assert code == 0
    assert "1 images" in text
    code, _, err = cli(*words, "--overwrite")
    assert code == 1
    assert "the nearest in the bundle is 6" in err, "nine steps need a program of their own"


def test_a_refused_sample_writes_nothing(cli: Any, dit_bundle: OpenBundle, tmp_path: Path) -> None:
    code, _, err = cli("sample", dit_bundle.root, "-o", tmp_path / "new" / "a.png", "--class", "digit 77")
    assert code == 1
    assert "did you mean 'digit 7'?" in err
    assert list(tmp_path.iterdir()) == []


def test_sample_reuses_features_where_the_bundle_has_a_plan(cli: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", Shape(cached=(4,)))
    given = ("sample", bundle, "-o", tmp_path / "a.png", "--overwrite", "--engine", "echo", "--class", 1, "--steps")
    assert "50% of the evaluations reused features" in cli(*given, 4)[1]
    assert "reused" not in cli(*given, 4, "--cache", "none")[1]
    code, _, err = cli(*given, 5, "--cache", "plan")
    assert code == 1
    assert "'plan' for 5 steps of EchoScheduler, wanted a call that the bundle has a plan for" in err
    assert cli(*given, 4, "--cache", "always")[0] == 1


def test_inspect_shows_facts_for_people_and_for_machines(cli: Any, dit_bundle: OpenBundle) -> None:
    facts = describe(dit_bundle.root)
    code, text, _ = cli("inspect", dit_bundle.root)
    assert code == 0
    assert text == render(facts) + "\n"
    code, text, _ = cli("inspect", dit_bundle.root, "--json")
    assert code == 0
    assert json.loads(text) == facts


def test_report_prints_its_table_and_says_where_it_is(
    cli: Any, compile_tiny: Any, tmp_path: Path
) -> None:
    made = compile_tiny(tmp_path / "bundle").bundle
    code, text, err = cli(
        "report", made.root, "--samples", 3, "--guidance", "1.5,3", "--steps", 3, "--threads", 1
    )
    assert (code, "Traceback" in err) == (0, False)
    assert "guidance 1.5" in text
    assert "guidance 3" in text
    assert f"wrote {made.root / 'report' / 'index.html'}" in text
    facts = json.loads((made.root / "report" / "report.json").read_text())
    assert facts["quality"]["samples"] == 3


def test_report_of_a_bundle_without_reference_says_how_to_get_one(cli: Any, compile_tiny: Any, tmp_path: Path) -> None:
    made = compile_tiny(tmp_path / "lean", reference=False).bundle
    code, _, err = cli("report", made.root)
    assert code == 1
    assert "found no float reference beside it" in err
    assert "compile it again with --reference" in err
    made = compile_tiny(tmp_path / "float", precision="float32").bundle
    code, _, err = cli("report", made.root)
    assert code == 1
    assert "found a float bundle" in err


def test_demo_hands_its_options_on(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def run_demo(out: Path, **given: Any) -> str:
        seen.update(given, out=out)
        return "done"

    monkeypatch.setattr(demo_module, "run_demo", run_demo)
    code, text, _ = cli("demo", "-o", tmp_path / "d", "--overwrite", "--threads", 1)
    assert (code, text) == (0, "done\n")
    assert (seen["out"], seen["overwrite"], seen["threads"]) == (tmp_path / "d", True, 1)


def test_the_demo_runs_with_fewer_samples(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the command on the trained model, with a 32nd of the calibration and a small report."""
    from quantempo import report

    write, fewer = report.write_report, {"samples": 8, "population": 24, "worst": 1, "worst_samples": 2}
    monkeypatch.setattr(report, "write_report", lambda bundle, options, **more: write(
        bundle, dataclasses.replace(options, **fewer), **more
    ))
    small = dataclasses.replace(demo_module.DEMO_RECIPE, samples=16, batch=4, steps=(8,), guidance=(1.5, 4.0))
    monkeypatch.setattr(demo_module, "DEMO_RECIPE", small)
    code, text, err = cli("demo", "-o", tmp_path / "demo", "--threads", 1)
    assert code == 0, err
    facts = json.loads((tmp_path / "demo" / "report" / "report.json").read_text())
    assert f"{facts['quality']['psnr_db']:.2f} dB" in text
    # 51 dB when this was written; the best single scale of a full calibration had 49.
    assert facts["quality"]["psnr_db"] > 45
    assert facts["quality"]["accuracy"] >= 0.9
    for name in ("samples.png", "sheet.png", "index.html"):
        assert (tmp_path / "demo" / "report" / name).is_file()
    with Image.open(tmp_path / "demo" / "report" / "samples.png") as picture:
        assert np.asarray(picture).std() > 20, "digits, not an empty sheet"


@pytest.mark.full
def test_the_demo_makes_bundle_pictures_and_report(cli: Any, tmp_path: Path) -> None:
    code, text, _ = cli("demo", "-o", tmp_path / "demo")
    assert code == 0
    assert "accuracy" in text
    facts = json.loads((tmp_path / "demo" / "report" / "report.json").read_text())
    assert facts["quality"]["psnr_db"] >= 46
    assert facts["quality"]["accuracy"] >= 0.95
    assert (tmp_path / "demo" / "report" / "samples.png").is_file()
    assert (tmp_path / "demo" / "report" / "sheet.png").is_file()
