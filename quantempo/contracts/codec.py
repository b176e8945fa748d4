"""Frozen dataclasses to plain JSON data and back, closed: an unknown key is an error, a missing one too.

Rules: tuples become lists; a field that equals its default is left out; a union of dataclasses is told apart by the
class variable `kind`.  `canonical_json` gives one text per value (sorted keys, no spaces that depend on anything), so
digests and diffs are stable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from quantempo.errors import DataError, UnknownKey, nearest

T = TypeVar("T")


def to_data(value: Any) -> Any:
    """Plain JSON data (dict, list, str, int, float, bool, None) for a contract value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data: dict[str, Any] = {}
        kind = getattr(type(value), "kind", None)
        if isinstance(kind, str):
            data["kind"] = kind
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if not _is_default(field, item):
                data[field.name] = to_data(item)
        return data
    if isinstance(value, (tuple, list)):
        return [to_data(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"JSON cannot hold {value!r}")
    return value


def _is_default(field: dataclasses.Field[Any], item: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(item == field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(item == field.default_factory())
    return False


def from_data(cls: type[T], data: Any, where: str) -> T:
    """The value of type `cls` that `data` describes.

    Args:
        cls: a frozen dataclass, or any type that its fields may have.
        data: parsed JSON.
        where: file or field path, for messages.

    Raises:
        UnknownKey: a key that the type does not have.
        DataError: a missing key, or a value of another type.
    """
    return typing.cast(T, _decode(cls, data, where))


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(hint), data, where)
    if origin is typing.Literal:
        if data not in typing.get_args(hint):
            raise _wrong(where, data, "one of " + ", ".join(map(repr, typing.get_args(hint))))
        return data
    if origin is tuple:
        return _decode_tuple(typing.get_args(hint), data, where)
    if origin is not None:
        return _decode_mapping(typing.get_args(hint)[1], data, where)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast(type, hint), data, where)
    return _decode_scalar(hint, data, where)


def _decode_mapping(value_hint: Any, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _wrong(where, data, "an object")
    return {key: _decode(value_hint, item, f"{where}.{key}") for key, item in data.items()}


def _decode_scalar(hint: type, data: Any, where: str) -> Any:
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise _wrong(where, data, f"a value of type {hint.__name__}")
    return data


def _decode_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(where, data, "a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(args) != len(data):
        raise _wrong(where, data, f"a list of {len(args)} items")
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))


def _decode_union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in members:
        return None
    if isinstance(data, dict):
        kinds = {m.kind: m for m in members if dataclasses.is_dataclass(m) and hasattr(m, "kind")}
        if kinds:
            kind = data.get("kind")
            if kind not in kinds:
                raise _wrong(where, kind, f"a kind among {', '.join(sorted(kinds))}", hint=nearest(str(kind), kinds))
            return _decode(kinds[kind], data, where)
    for member in members:
        if member is type(None):
            continue
        try:
            return _decode(member, data, where)
        except DataError:
            continue
    raise _wrong(where, data, " or ".join(getattr(m, "__name__", str(m)) for m in members))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(where, data, f"an object ({cls.__name__})")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kind = getattr(cls, "kind", None)
    known = {*fields, "kind"} if kind is not None else set(fields)
    for key in data:
        if key not in known:
            raise UnknownKey(
                f"{where}.{key}",
                found=f"an unknown key {key!r}",
                wanted=f"only keys of {cls.__name__}",
                cause="a misspelling, or a file written by a newer version",
                remedy=nearest(key, known),
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(_hints(cls)[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(
                f"{where}.{name}",
                found="no such key",
                wanted=f"a {cls.__name__} with {name!r}",
                cause="the file is incomplete or was edited by hand",
                remedy=f"add {name!r}, or write the file anew",
            )
    return cls(**values)


def _wrong(where: str, data: Any, wanted: str, hint: str = "correct the value, or write the file anew") -> DataError:
    shown = json.dumps(data, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(where, found=shown, wanted=wanted, cause="the file was edited by hand or is damaged", remedy=hint)


def canonical_json(value: Any) -> str:
    """One JSON text per value: sorted keys, two-space indent, short leaf lists on one line, final newline."""
    return _render(to_data(value), 0) + "\n"


def _render(data: Any, depth: int) -> str:
    flat = json.dumps(data, sort_keys=True, allow_nan=False)
    if len(flat) + 2 * depth <= 118 or not isinstance(data, (dict, list)) or not data:
        return flat
    pad = "  " * (depth + 1)
    if isinstance(data, dict):
        body = ",\n".join(f"{pad}{json.dumps(k)}: {_render(data[k], depth + 1)}" for k in sorted(data))
        return "{\n" + body + "\n" + "  " * depth + "}"
    body = ",\n".join(pad + _render(item, depth + 1) for item in data)
    return "[\n" + body + "\n" + "  " * depth + "]"


def parse_json(text: str | bytes, where: str) -> Any:
    """Parsed JSON; a syntax error becomes a `DataError` that names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            where,
            found=f"text that is not JSON ({error})",
            wanted="a JSON document",
            cause="the file is damaged or was cut short",
            remedy="write the file anew",
        ) from error


def digest(data: bytes | str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
