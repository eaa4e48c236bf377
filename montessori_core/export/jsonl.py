"""Write rows as lines of JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line; what JSON does not have becomes null (NaN, infinity) or text (dates)."""
    return json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value
