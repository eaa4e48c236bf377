"""Files of the built-in data sets."""

from importlib.resources import files
from importlib.resources.abc import Traversable

from montessori_core.errors import DataError

_SEED_POOLS = ("short", "half-coding", "half-maths")


def builtin_file(path: str, field: str) -> Traversable:
    """Return the file of a built-in set: `builtin` has tasks of all kinds, `builtin/maths` a target of one kind.

    Raises:
        DataError: no such set.
    """
    folder = files("montessori_core") / "data" / "builtin"
    if field not in ("seed_pool", "reference", "evaluation"):
        raise DataError(
            f"{field}.path: {path}: the built-in sets are seeds, references and held-out examples; give a file"
        )
    if path == "builtin":
        return folder / f"{field}.jsonl"
    targets = {f"builtin/{target.name}": target / f"{field}.jsonl" for target in (folder / "targets").iterdir()}
    pools = {f"builtin/{name}": folder / f"{name.replace('-', '_')}_seed_pool.jsonl" for name in _SEED_POOLS}
    named = pools if field == "seed_pool" else targets
    if path in named:
        return named[path]
    why = ""
    if path in targets:
        why = " is a target: it has no seeds, so that the teacher is not shown what influence is measured on"
    choices = ", ".join(["builtin", *sorted(named)])
    raise DataError(
        f"{field}.path: {path}{why or ': no such built-in set'}; give one of {choices}, or a file of your own"
    )
