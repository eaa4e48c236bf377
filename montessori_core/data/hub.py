"""Read rows of a Hugging Face data set, from the hub or from a folder with its files."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from montessori_core.config import DataSource
from montessori_core.errors import DataError


def hub_rows(
    source: DataSource, field: str, on_commit: Callable[[str], object] = lambda commit: None
) -> Iterator[tuple[str, Any]]:
    """Yield (place in the data set, row) pairs.

    Args:
        source: the data set.
        field: name of its section, for errors.
        on_commit: called with the commit on the hub that is read, before the first row.

    Raises:
        DataError: it cannot be loaded, or has several subsets and `source` names none of them; the message lists them. Or
            the files of a folder are outside of it, or exceed a bound.
    """
    import datasets

    from montessori_core.data.downloads import CheckedDownloads

    path = os.path.expanduser(source.path)
    # The library recognises files by path and time of change: another file with the same time would not be read.
    is_folder = os.path.isdir(path)
    mode = datasets.DownloadMode.FORCE_REDOWNLOAD if is_folder else None
    try:
        builder = datasets.load_dataset_builder(path, source.subset, revision=source.revision, download_mode=mode)
        if is_folder:
            _check_paths(path, [name for names in (builder.config.data_files or {}).values() for name in names])
        config = datasets.DownloadConfig(force_download=is_folder, force_extract=is_folder, use_etag=False)
        downloads = CheckedDownloads(
            builder.dataset_name, download_config=config, base_path=builder.base_path, record_checksums=False
        )
        builder.download_and_prepare(download_mode=mode, dl_manager=downloads)
        rows = builder.as_dataset(source.split)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds
        # Without a network, asking for the subsets would only repeat the waits.
        subsets = [] if isinstance(error, ConnectionError) else _subsets_of(path, source.revision)
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
    if not is_folder and re.fullmatch("[0-9a-f]{40}", str(builder.hash)):
        on_commit(builder.hash)
    place = ", ".join(filter(None, (source.subset, source.split)))
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source.path} ({place}), row {number}", row
    except Exception as error:  # of a column's decoder
        raise DataError(f"{source.path} ({place}), row {number + 1}: cannot be read ({error})") from error


def _check_paths(folder: str, names: list[str]) -> None:
    """Check that the card of a folder names files of the folder.

    Raises:
        DataError: a file is outside of it.
    """
    roots = tuple(os.path.join(path, "") for path in (os.path.abspath(folder), os.path.realpath(folder)))
    for name in names:
        path = name.rpartition("::")[2]
        if "://" in path or not os.path.abspath(path).startswith(roots):
            raise DataError(f"{folder}: its card names {path!r}, which is outside of the folder; remove that entry")


def _subsets_of(path: str, revision: str | None) -> list[str]:
    """Return the names of a data set's subsets; none if they cannot be read."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(path, revision=revision))
    except Exception:  # the library raises many kinds
        return []
