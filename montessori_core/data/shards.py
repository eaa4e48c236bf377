"""The files of a data set: a file, a glob or folder of shards, a folder that `datasets` saved, an fsspec path."""

import glob
import json
import os
import re
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from montessori_core.data.files import COMPRESSIONS, KINDS, DataFile, kind_of
from montessori_core.data.jsonl import open_text
from montessori_core.errors import DataError

_KINDS = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"
_SPLIT = re.compile(r"(^|[-_. ])(train|test|validation|valid|val|dev|eval|evaluation)[-_. ]", re.IGNORECASE)
_MOST_ENTRIES = 100_000  # in a folder and its subfolders
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def is_url(path: str) -> bool:
    """Return whether a path is an fsspec URL, such as s3://bucket/rows.jsonl."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def find_remote(url: str) -> list[DataFile]:
    """Return the files of an fsspec URL: of a file, a folder or a glob.

    Raises:
        DataError: its file system is not installed or does not answer, or there is no such file.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            paths = [str(name) for name in system.glob(path)]
        elif not kind_of(path) or system.isdir(path):
            paths = [str(name) for name in system.ls(path, detail=False)]
        else:
            paths = [path]
        names = {name: str(system.unstrip_protocol(name)) for name in paths}
    except ImportError as error:
        raise DataError(f"{url}: {error}; install the package in this environment") from error
    except Exception as error:  # file systems raise many kinds
        raise DataError(
            f"{url}: cannot be read ({error or type(error).__name__}); check the path and the login"
        ) from error
    if "file" in system.protocol:
        system = None  # so that pipes and devices are refused
    if paths == [path] and kind_of(path):
        return [DataFile(path, url, system)]
    return _of_one_kind([DataFile(name, names[name], system) for name in paths], url)


def find_local(path: Path, split: str, field: str) -> list[DataFile] | None:
    """Return the files of a path on this machine; None if it is a data set's folder for the library `datasets`, or a hub id.

    Args:
        path: a file, a glob or a folder.
        split: of a folder that `datasets` saved.
        field: the setting, for errors.

    Raises:
        DataError: files have several kinds or none that is read, or there are none.
    """
    text = str(path)
    try:
        exists, is_folder = os.path.lexists(path), path.is_dir()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise DataError(f"{text}: cannot be read ({getattr(error, 'strerror', error)}); check the path") from error
    if is_folder:
        return _files_in(path, split, field)
    if not exists and glob.has_magic(text):
        return _of_one_kind([DataFile(name, name) for name in glob.glob(text, recursive=True)], text)
    if kind_of(text):
        return [DataFile(text, text)]
    if not exists and text.startswith(("/", "..")):
        raise DataError(f"{field}.path: {text}: no such file or folder; correct the path")
    if exists or path.suffix[1:].isalpha() or text.startswith(("/", "..")):
        raise DataError(f"{field}.path: {text}: expected {expected()}")
    return None


def expected() -> str:
    """Return what a path may be, for errors."""
    return (
        f"a file ({_KINDS}), a glob or a folder of such files, a Hugging Face data set id or a folder with such a data "
        "set, 'builtin' or 'builtin/<kind>'"
    )


def _files_in(folder: Path, split: str, field: str) -> list[DataFile] | None:
    """Return the files of a folder; None if the library `datasets` must decide which of them are read."""
    if (folder / "dataset_dict.json").exists():
        folder = _saved_split(folder, split, field)
    if (folder / "state.json").exists():
        return _saved_files(folder)
    try:
        entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
    except OSError as error:
        raise DataError(f"{field}.path: {folder}: cannot be read ({error}); check the folder") from error
    if len(entries) > _MOST_ENTRIES:
        raise DataError(
            f"{field}.path: {folder}: more than {_MOST_ENTRIES:,} files; name a folder with data files only"
        )
    files = [path for path in sorted(entries) if kind_of(path.name) and path.name not in _DESCRIPTIONS]
    files = [path for path in files if not path.name.startswith((".", "_")) and path.is_file()]
    if not files:
        raise DataError(f"{field}.path: {folder}: no data files in this folder; expected {expected()}")
    # Folders and names of splits, and the list of files in a data card, are for the library `datasets`.
    named = any(path.parent != folder or _SPLIT.search(path.name) for path in files)
    if named or (folder / "README.md").exists():
        return None
    return _of_one_kind([DataFile(str(path), str(path)) for path in files], str(folder))


def _of_one_kind(files: list[DataFile], where: str) -> list[DataFile]:
    """Return data files in the order of their names.

    Raises:
        DataError: there are none, or they have several kinds.
    """
    shards = [file for file in files if file.kind and not PurePosixPath(file.path).name.startswith((".", "_"))]
    if not shards:
        raise DataError(f"{where}: no data files there; expected names that end in {_KINDS}")
    shards.sort(key=lambda file: file.name)
    kinds = {file.kind: file.name for file in reversed(shards)}
    if len(kinds) > 1:
        raise DataError(
            f"{where}: files of several kinds, e.g. {' and '.join(sorted(kinds.values())[:2])}; name those of one kind with "
            "a glob such as folder/*.jsonl"
        )
    return shards


def _saved_split(folder: Path, split: str, field: str) -> Path:
    splits = _description(folder / "dataset_dict.json").get("splits")
    names = [str(name) for name in splits] if isinstance(splits, list) else []
    if split not in names:
        raise DataError(
            f"{field}.path: {folder} has no split {split!r}; set {field}.split to one of {', '.join(names) or '(none)'}"
        )
    return _inside(folder, split)


def _saved_files(folder: Path) -> list[DataFile]:
    listed = _description(folder / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and kind_of(name) == ".arrow" for name in names):
        raise DataError(f"{folder / 'state.json'}: names no Arrow files; save the data set again with save_to_disk")
    return [DataFile(str(path), str(path)) for path in (_inside(folder, str(name)) for name in names)]


def _inside(folder: Path, name: str) -> Path:
    """Return a path in a folder.

    Raises:
        DataError: the name leads out of it.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].endswith((":", "/")):
        raise DataError(f"{folder}: it names {name!r}, which is outside of the folder; remove that entry")
    return folder / name


def _description(path: Path) -> dict[str, Any]:
    """Return the content of a small JSON file of `datasets`."""
    with open_text(path) as stream:
        try:
            content = json.loads(stream.read(2**24))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); save the data set again with save_to_disk") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object; save the data set again with save_to_disk")
    return content
