"""Values of a foreign JSON file, each of a type and in a range. What is wrong is a ValueError in one short line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

Table = Mapping[str, Any]


def number(table: Table, key: str, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key} is {brief(value)}; give a number from {low:g} to {high:g}")
    return float(value)


def whole(table: Table, key: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`; 1000.0 is one."""
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value % 1:
        raise ValueError(f"{key} is {brief(value)}; give a whole number from {low} to {high}")
    return int(value)


def truth(table: Table, key: str) -> bool:
    """True or false; null is false."""
    value = table[key]
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {brief(value)}; give true or false")
    return bool(value)


def choice(table: Table, key: str, names: Collection[str]) -> str:
    """One of `names`."""
    value = table[key]
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{key} is {brief(value)}; give {' or '.join(names)}")
    return value


def brief(value: Any) -> str:
    """A value as JSON, of at most 40 characters."""
    text = json.dumps(value[:9] if isinstance(value, list) else value, default=str)
    return text if len(text) <= 40 else f"{text[:28]}...{text[-8:]}"
