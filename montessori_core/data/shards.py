"""The files of a data set: a file, a glob or folder of shards, a folder that `datasets` saved, an fsspec path."""

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from montessori_core.data.files import COMPRESSIONS, KINDS, DataFile, kind_of
from montessori_core.data.splits import split_named, splits_of
from montessori_core.errors import DataError

_KINDS = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"
_MOST_ENTRIES = 100_000  # in a folder and its subfolders
_LONGEST_CARD = 2**20  # characters
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def is_url(path: str) -> bool:
    """Return whether a path is an fsspec URL, such as s3://bucket/rows.jsonl."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def find_remote(url: str, split: str, field: str) -> list[DataFile]:
    """Return the files of an fsspec URL: of a file, a folder or a glob.

    Args:
        url: of the files.
        split: of a folder with several.
        field: the setting, for errors; empty for none.

    Raises:
        DataError: its file system is not installed or does not answer, or there is no such file.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        is_glob = glob.has_magic(path)
        if is_glob:
            paths = [str(name) for name in system.glob(path)]
        elif not kind_of(path) or system.isdir(path):
            system.ls(path, detail=False)  # an error if there is no such folder
            paths = [str(name) for name in system.find(path)]
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
    files = [DataFile(name, names[name], system) for name in paths]
    if is_glob:
        return _of_one_kind(files, url)
    if len(files) > _MOST_ENTRIES:
        raise DataError(f"{url}: more than {_MOST_ENTRIES:,} files; name a folder with data files only")
    folder = DataFile(path.rstrip("/"), url.rstrip("/"), system)
    inside = {file: _path_in(folder, file) for file in files}
    top = {str(place) for place in inside.values() if len(place.parts) == 1}
    if (saved := _saved_files(folder, top, split, field)) is not None:
        return saved
    return _of_one_kind(_of_split(_visible(inside), split, url, field), url)


def _path_in(folder: DataFile, file: DataFile) -> PurePosixPath:
    """Return the path of a file relative to its folder, or its name alone if the file system writes the two differently."""
    path, start = PurePosixPath(file.path), PurePosixPath(folder.path)
    return path.relative_to(start) if path.is_relative_to(start) else PurePosixPath(path.name)


def find_local(path: Path, split: str, field: str) -> list[DataFile] | None:
    """Return the files of a path on this machine; None if it is a data set's folder for the library `datasets`, or a hub id.

    Args:
        path: a file, a glob or a folder.
        split: of a folder with several.
        field: the setting, for errors; empty for none.

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
        raise DataError(f"{_at(field)}{text}: no such file or folder; correct the path")
    if exists or path.suffix[1:].isalpha() or text.startswith(("/", "..")):
        raise DataError(f"{_at(field)}{text}: expected {expected()}")
    return None


def expected() -> str:
    """Return what a path may be, for errors."""
    return (
        f"a file ({_KINDS}), a glob or a folder of such files, a Hugging Face data set id or a folder with such a data "
        "set, 'builtin' or 'builtin/<kind>'"
    )


def _files_in(folder: Path, split: str, field: str) -> list[DataFile] | None:
    """Return the files of a folder; None if the library `datasets` must decide which of them are read."""
    described = {name for name in _DESCRIPTIONS if (folder / name).exists()}
    if (saved := _saved_files(DataFile(str(folder), str(folder)), described, split, field)) is not None:
        return saved
    try:
        entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
    except OSError as error:
        raise DataError(f"{_at(field)}{folder}: cannot be read ({error}); check the folder") from error
    if len(entries) > _MOST_ENTRIES:
        raise DataError(f"{_at(field)}{folder}: more than {_MOST_ENTRIES:,} files; name a folder with data files only")
    paths = sorted(path for path in entries if kind_of(path.name) and path.is_file())
    inside = _visible({DataFile(str(path), str(path)): PurePosixPath(path.relative_to(folder)) for path in paths})
    if not inside:
        raise DataError(f"{_at(field)}{folder}: no data files in this folder; expected {expected()}")
    if not re.fullmatch(r"[\w.-]+", split) or _lists_files(folder):  # train[:100] is for the library, too
        return None
    return _of_one_kind(_of_split(inside, split, str(folder), field), str(folder))


def _visible(inside: Mapping[DataFile, PurePosixPath]) -> dict[DataFile, PurePosixPath]:
    """Return the files of a folder that have rows and are not hidden, with their paths in it."""
    hidden = {file for file, path in inside.items() if any(part.startswith((".", "_")) for part in path.parts)}
    return {file: inside[file] for file in _data_files(inside) if file not in hidden}


def _lists_files(folder: Path) -> bool:
    """Return whether the data card of a folder lists the files of its subsets and splits."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as stream:
        header = re.match(r"---\s*\n(.*?)\n---", stream.read(_LONGEST_CARD), re.DOTALL)
    return header is not None and re.search(r"^[\"']?configs\b", header[1], re.MULTILINE) is not None


def _of_split(inside: Mapping[DataFile, PurePosixPath], split: str, where: str, field: str) -> list[DataFile]:
    """Return the files of a split; all files if none is named after a split.

    Args:
        inside: files of a folder, with their paths in it.
        split: the split.
        where, field: the folder and the setting (empty for none), for errors.

    Raises:
        DataError: there is no such split.
    """
    splits = splits_of(list(inside.values()))
    if not any(splits):
        return list(inside)
    found = [file for file, name in zip(inside, splits, strict=True) if name == split_named(split)]
    if not found:
        raise _no_split(where, split, sorted(set(filter(None, splits))), field)
    return found


def _no_split(where: str, split: str, splits: list[str], field: str) -> DataError:
    names = ", ".join(splits) or "(none)"
    remedy = f"set {field}.split to one of {names}, or name files" if field else f"name files (it has splits {names})"
    return DataError(f"{_at(field)}{where} has no split {split!r}; {remedy}")


def _at(field: str) -> str:
    """Return how an error about a setting begins; nothing for a path that is no setting."""
    return f"{field}.path: " if field else ""


def _of_one_kind(files: list[DataFile], where: str) -> list[DataFile]:
    """Return data files in the order of their names.

    Raises:
        DataError: there are none, or they have several kinds.
    """
    shards = _data_files(files)
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


def _data_files(files: Iterable[DataFile]) -> list[DataFile]:
    """Return the files that have rows."""
    shards = [file for file in files if file.kind and not _name(file).startswith((".", "_"))]
    return [file for file in shards if _name(file) not in _DESCRIPTIONS]


def _saved_files(folder: DataFile, names: Set[str], split: str, field: str) -> list[DataFile] | None:
    """Return the files of a folder that `datasets` saved, in their order; None if it is no such folder.

    Args:
        folder: path, name and file system of the folder.
        names: of its files.
        split: which of several splits.
        field: the setting, for errors; empty for none.

    Raises:
        DataError: there is no such split, or a description of the folder cannot be used.
    """
    if "dataset_dict.json" in names:
        listed = _description(_inside(folder, "dataset_dict.json")).get("splits")
        splits = [str(name) for name in listed] if isinstance(listed, list) else []
        if split not in splits:
            raise _no_split(folder.name, split, splits, field)
        folder = _inside(folder, split)
    elif "state.json" not in names:
        return None
    state = _inside(folder, "state.json")
    listed = _description(state).get("_data_files")
    files = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not files or not all(isinstance(name, str) and kind_of(name) == ".arrow" for name in files):
        raise DataError(f"{state.name}: names no Arrow files; save the data set again with save_to_disk")
    return [_inside(folder, str(name)) for name in files]


def _inside(folder: DataFile, name: str) -> DataFile:
    """Return a file in a folder.

    Raises:
        DataError: the name leads out of it.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].endswith((":", "/")):
        raise DataError(f"{folder.name}: it names {name!r}, which is outside of the folder; remove that entry")
    return DataFile(f"{folder.path}/{name}", f"{folder.name}/{name}", folder.system)


def _name(file: DataFile) -> str:
    return PurePosixPath(file.path).name


def _description(file: DataFile) -> dict[str, Any]:
    """Return the content of a small JSON file of `datasets`."""
    with file.open() as stream:
        try:
            content = json.loads(stream.read(2**24))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file.name}: not valid JSON ({error}); save the data set again with save_to_disk"
            ) from error
    if not isinstance(content, dict):
        raise DataError(f"{file.name}: expected an object; save the data set again with save_to_disk")
    return content
