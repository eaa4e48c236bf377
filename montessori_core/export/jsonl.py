"""Write rows as lines of JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line; what JSON does not have becomes null (NaN) or text (dates)."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"
