"""Checking values that were read from JSON, and naming their kinds in errors."""

import math
from collections.abc import Callable
from types import NoneType
from typing import NoReturn

Fail = Callable[[str], NoReturn]  # raises a ValueError that names the file


def describe_kind(value: object) -> str:
    """What kind of JSON value something is."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(type(value), "a number")


def is_number(value: object) -> bool:
    """Whether something is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_names(names: object, key: str, fail: Fail) -> tuple[str, ...]:
    """Checks a list of distinct names.

    Args:
        names: what the file holds.
        key: where it holds it.
        fail: is called with what is wrong.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        fail(f"{key} must be a list of names, found {names!r:.200}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            fail(f"{key} names {name!r} twice")
        seen.add(name)
    return tuple(names)
