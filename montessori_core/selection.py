"""Selecting by rank."""

from collections.abc import Sequence


def upper_half(ids: Sequence[str], values: Sequence[float]) -> list[str]:
    """The ids of the larger half of the values (rounded up), highest first; of equals, those that come first."""
    order = sorted(range(len(ids)), key=lambda index: (-values[index], index))
    return [ids[index] for index in order[: -(-len(ids) // 2)]]
