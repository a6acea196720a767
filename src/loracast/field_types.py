"""Compares the values that a file gives a dataclass with the types that its fields state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LARGEST = 2**63
"""A whole number beyond it is in no file that we write, and arithmetic with it would take memory or overflow."""


def type_faults(value: Any) -> list[str]:
    """The fields of a dataclass's instance whose values are not of their types; numbers have to be finite."""
    return value_faults(type(value), {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})


def value_faults(kind: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """Those of a dataclass's values, by field and before it is made of them, that are not of their fields' types."""
    hints = _hints(kind)
    return [f"{name} is {repr(value)[:80]}" for name, value in values.items() if not _fits(value, hints[name])]


@cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, which take a while to find out."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is Sequence:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return len(wanted) == len(value) and all(map(_fits, value, wanted))
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint is float:
        return type(value) in (int, float) and -_LARGEST < value < _LARGEST and math.isfinite(value)
    if hint is int:
        return type(value) is int and -_LARGEST < value < _LARGEST
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint) and not type_faults(value)  # type: ignore[arg-type]
    return type(value) is (type(None) if hint is None else hint)
