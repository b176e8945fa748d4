from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from quantempo.calib.trajectories import ProgramChoice
from quantempo.contracts.manifest import ArrayInput, ClassInput, Denoiser
from quantempo.errors import RequestError
from quantempo.pipeline import compile_model, trajectory_batches
from quantempo.recipe import Recipe
from quantempo.stages.conditioning import check_arrays, read_arrays, resolve

CLASSES = Denoiser((4, 8, 8), (ClassInput("class_labels", 10, 10, {"3": "cat", "4": "dog"}),))
ARRAYS = Denoiser((4, 8, 8), (), (ArrayInput("encoder_hidden_states", "float32", (77, 24)),))
GOOD = {name: np.ones((3, 77, 24), np.float32) for name in ("encoder_hidden_states", "negative_encoder_hidden_states")}


def from_file(path: Path, denoiser: Denoiser = CLASSES) -> Any:
    return resolve(Recipe(calibration=str(path)), denoiser, {})


def test_labels_come_one_per_line_or_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\n\n7\n dog \n")
    (tmp_path / "a.json").write_text('["cat", 7, "4"]')
    for name in ("a.txt", "a.json"):
        recipe, arrays = from_file(tmp_path / name)
        assert recipe.classes == (3, 7, 4)
        assert recipe.calibration == "", "a bundle names no path"
        assert arrays == {}


def test_arrays_come_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **GOOD)
    _, arrays = from_file(tmp_path / "a.npz", ARRAYS)
    assert sorted(arrays) == sorted(GOOD)


@pytest.mark.parametrize(
    ("name", "text", "denoiser", "words"),
    [
        ("a.txt", "cart", CLASSES, ("entry 1", "'cart'", "a class name or 0 to 9", "did you mean 'cat'" )),
        ("a.txt", "1\n12", CLASSES, ("entry 2", "found 12, wanted 0 to 9")),
        ("a.txt", "\n", CLASSES, ("no entry", "at least one")),
        ("a.json", "{}", CLASSES, ("JSON of type dict", "a list")),
        ("a.json", "[1.5]", CLASSES, ("entry 1", "1.5")),
        ("a.txt", "1", ARRAYS, ("found labels", "encoder_hidden_states", ".npz")),
        ("a.npz", "text", ARRAYS, ("a file that numpy cannot read",)),
        ("a.csv", "1", CLASSES, ("a file of type .csv", ".npz or .txt or .json")),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    tmp_path: Path, name: str, text: str, denoiser: Denoiser, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError) as caught:
        from_file(tmp_path / name, denoiser)
    for word in (f"calibration set {tmp_path / name}", *words):
        assert word in str(caught.value)


def test_a_missing_file_and_two_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found no such file"):
        from_file(tmp_path / "a.txt")
    with pytest.raises(RequestError, match="one source of conditioning"):
        resolve(Recipe(calibration="a.npz"), ARRAYS, GOOD)


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", encoder_hidden_states=np.array([{"a": 1}], object))
    with pytest.raises(RequestError, match="a file that numpy cannot read"):
        from_file(tmp_path / "a.npz", ARRAYS)


@pytest.mark.parametrize(
    ("name", "words"), [("a.txt", "found no entry"), ("a.json", "found no entry"), ("a.npz", "found no array")]
)
def test_an_empty_set_is_refused_on_the_command_line_before_any_work(
    cli: Any, tmp_path: Path, name: str, words: str
) -> None:
    file = tmp_path / name
    file.write_text("[]" if name.endswith("json") else " \n\n")
    if name.endswith("npz"):
        np.savez(file)
    code, _, err = cli("compile", tiny_models.dit_pipeline(), "-o", tmp_path / "out", "--calib-set", file)
    assert code == 1
    assert f"RequestError: calibration set {file}: {words}, wanted at least one" in err
    assert "Likely cause: the set is empty" in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


NAME = "encoder_hidden_states"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_hidden_state": GOOD[NAME]}, ("a name that the model does not have", f"did you mean '{NAME}'?")),
        ({NAME: None}, (f"input '{NAME}'", "found no array", "float32 of shape (samples, 77, 24)", "--calib-set")),
        (dict.fromkeys(GOOD), (f"inputs '{NAME}', 'negative_{NAME}'", f"savez(FILE, {NAME}=…, negative_{NAME}=…)")),
        ({NAME: GOOD[NAME][:, :70]}, ("shape (3, 70, 24)", "(samples, 77, 24)")),
        ({NAME: GOOD[NAME][0]}, ("shape (77, 24)",)),
        ({NAME: GOOD[NAME].astype(np.float64)}, ("type float64", ".astype('float32')")),
        ({NAME: GOOD[NAME][:0]}, ("no row", "the set is empty")),
        ({NAME: GOOD[NAME] * np.float32(np.nan)}, ("NaN or infinity",)),
        ({NAME: GOOD[NAME][:2]}, ("2 rows (encoder_hidden_states), 3 rows (negative_", "as many rows in each")),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    given = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    with pytest.raises(RequestError) as caught:
        check_arrays(ARRAYS, given)
    for word in words:
        assert word in str(caught.value)


def test_one_empty_prompt_is_enough_for_all_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{**GOOD, f"negative_{NAME}": GOOD[f"negative_{NAME}"][:1]})
    found = read_arrays(tmp_path / "a.npz")
    check_arrays(ARRAYS, found)
    assert len(found[f"negative_{NAME}"]) == len(GOOD[NAME])
    assert np.all(found[f"negative_{NAME}"] == GOOD[f"negative_{NAME}"][0])


def test_a_model_without_arrays_takes_none() -> None:
    with pytest.raises(RequestError, match="this model takes no arrays"):
        check_arrays(CLASSES, GOOD)


def test_a_file_of_labels_decides_what_is_calibrated(compile_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps([3, "digit 4"]))
    made = compile_tiny(tmp_path / "a", calibration=str(tmp_path / "labels.json"))
    same = compile_tiny(tmp_path / "b", classes=(3, 4))
    assert made.bundle.digest == same.bundle.digest


@pytest.mark.full
def test_a_file_of_arrays_calibrates_a_model_with_prompts(tmp_path: Path) -> None:
    model = tiny_models.condition_unet()
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", **{name: rng.standard_normal((3, 77, 24)).astype(np.float32) for name in GOOD})
    recipe = Recipe(samples=4, batch=4, steps=(2,), guidance=(2.0,), max_steps=2, threads=1,
                    calibration=str(tmp_path / "a.npz"))  # fmt: skip
    made = compile_model(model, tmp_path / "bundle", recipe, scheduler=model / "scheduler")
    assert made.quantized > 0


@pytest.mark.parametrize(("samples", "batch"), [(8, 2), (4, 1), (64, 16)])
def test_few_samples_run_in_smaller_batches(samples: int, batch: int) -> None:
    recipe = Recipe(samples=samples, guidance=(1.0, 1.5, 4.0, 7.0), steps=(4, 8))
    made = trajectory_batches(CLASSES, recipe, (ProgramChoice(4), ProgramChoice(8)), {})
    assert {len(one.seeds) for one in made} == {batch}
    assert {one.guidance for one in made} == set(recipe.guidance)
