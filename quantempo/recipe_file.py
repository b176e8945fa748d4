"""Recipes as files: YAML or JSON, with the fields of `Recipe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantempo.calib.trajectories import guidance_range
from quantempo.contracts.codec import from_data, parse_json
from quantempo.contracts.plan import Rule
from quantempo.errors import DataError, MissingExtra
from quantempo.recipe import Recipe

LISTS = ("rules",)
"""Fields whose entries add up over several files; of any other field the last one counts."""
PATHS = ("schedulers", "calibration", "controlnets", "ip_adapters", "inputs", "code")
"""Fields with file paths, which count from the recipe's own folder."""


def read_recipe(files: Sequence[Path], changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that files and further settings describe together: the later ones win.

    Args:
        files: YAML (`.yaml`, `.yml`) or JSON; a field of a later file replaces that of an earlier one, its rules are
            added after the earlier rules.
        changes: fields by name, which win over all files; their rules come after those of the files.

    Raises:
        UnknownKey: a field that `Recipe` does not have; the nearest is named.
        DataError: not a recipe, or a value of another type.
        PlanError, RequestError: a value that means nothing.
    """
    merged: dict[str, Any] = {}
    where = "recipe"
    for file in files:
        data = _load(file)
        from_data(Recipe, data, str(file))  # errors name this file
        for name, value in data.items():
            merged[name] = [*merged.get(name, []), *value] if name in LISTS else value
        where = str(file)
    recipe, last = from_data(Recipe, merged, where), dict(changes or {})
    for name in LISTS:
        if name in last:
            last[name] = (*getattr(recipe, name), *last[name])
    return dataclasses.replace(recipe, **last)


def read_rule(text: str, where: str) -> Rule:
    """A rule as it stands in a recipe: a YAML or JSON mapping.

    Args:
        text: e.g. `{match: "*.ff.*", action: keep}`.
        where: for errors.

    Raises:
        UnknownKey: a field that `Rule` does not have; the nearest is named.
        DataError: not a mapping, or a value of another type.
    """
    yaml = _parser(where)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        raise DataError(
            where, found=repr(text), wanted="a rule as in a recipe file, e.g. '{match: \"*.ff.*\", action: keep}'",
            cause="quotes are missing: a pattern that begins with * needs its own inside those of the shell",
            remedy="see docs/recipe.md for the fields of a rule",
        )
    return from_data(Rule, data, where)


def _parser(where: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra(where, package="PyYAML", extra="compile") from error
    return yaml


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise _unreadable(file, "no such file")
    data = parse_json(file.read_bytes(), str(file)) if file.suffix == ".json" else _yaml(file)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _unreadable(file, f"{type(data).__name__} at its top")
    for name in PATHS:
        if name in data:
            data[name] = _beside(file, data[name])
    if isinstance(data.get("guidance"), str):
        data["guidance"] = list(guidance_range(data["guidance"]))
    return data


def _beside(file: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_beside(file, item) for item in value]
    return str(file.parent / value) if isinstance(value, str) and value else value


def _yaml(file: Path) -> Any:
    yaml = _parser(f"recipe {file}")
    try:
        tree = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        _refuse_duplicates(file, tree)
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(file, f"text that is not YAML ({' '.join(str(error).split())})") from error


def _refuse_duplicates(file: Path, node: Any) -> None:
    """YAML parsers take the last of two equal keys without a word."""
    seen = set()
    for key, value in node.value if getattr(node, "id", "") == "mapping" else ():
        if key.value in seen:
            raise _unreadable(file, f"the key {key.value!r} twice (line {key.start_mark.line + 1})")
        seen.add(key.value)
        _refuse_duplicates(file, value)
    for item in node.value if getattr(node, "id", "") == "sequence" else ():
        _refuse_duplicates(file, item)


def _unreadable(file: Path, found: str) -> DataError:
    return DataError(
        f"recipe {file}", found=found, wanted="a YAML or JSON file with the fields of a recipe, such as `samples: 64`",
        cause="a slip while it was written, or another file", remedy="see docs/recipe.md for the fields",
    )
