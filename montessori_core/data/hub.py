"""Read rows of a Hugging Face data set, from the hub or from a folder with its files."""

import os
from collections.abc import Iterator
from typing import Any

from montessori_core.config import DataSource
from montessori_core.errors import DataError


def hub_rows(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    """Yield (place in the data set, row) pairs.

    Args:
        source: the data set.
        field: name of its section, for errors.

    Raises:
        DataError: it cannot be loaded, or has several subsets and `source` names none of them; the message lists them.
    """
    import datasets

    path = os.path.expanduser(source.path)
    # The library recognises files by path and time of change: another file with the same time would not be read.
    mode = datasets.DownloadMode.FORCE_REDOWNLOAD if os.path.isdir(path) else None
    try:
        rows = datasets.load_dataset(
            path, source.subset, split=source.split, revision=source.revision, download_mode=mode
        )
    except Exception as error:  # the library raises many kinds
        subsets = _subsets_of(path, source.revision)
        if len(subsets) > 1 and source.subset not in subsets:
            problem = "has several subsets" if source.subset is None else f"has no subset {source.subset!r}"
            raise DataError(
                f"{field}.path: data set {source.path!r} {problem}; set {field}.subset to one of {', '.join(subsets)}"
            ) from error
        part = f"subset {source.subset!r}, split {source.split!r}" if source.subset else f"split {source.split!r}"
        raise DataError(
            f"{field}.path: data set {source.path!r} ({part}) cannot be loaded: {error}; check the id and the network, or "
            "give a .jsonl or .parquet file"
        ) from error
    place = ", ".join(filter(None, (source.subset, source.split)))
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source.path} ({place}), row {number}", row
    except Exception as error:  # of a column's decoder
        raise DataError(f"{source.path} ({place}), row {number + 1}: cannot be read ({error})") from error


def _subsets_of(path: str, revision: str | None) -> list[str]:
    """Return the names of a data set's subsets; none if they cannot be read."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(path, revision=revision))
    except Exception:  # the library raises many kinds
        return []
