"""Copy a folder to an fsspec path, such as s3://bucket/folder; an interrupted copy continues."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from montessori_core.config.secrets import hide_logins
from montessori_core.errors import UserError
from montessori_core.files import hash_path
from montessori_core.formatting import first_names

FILES = "files.json"
"""The list of files beside them: size and SHA-256 of each, and whether all of them are there."""
_UNFINISHED = f"{FILES}.unfinished"
_BLOCK = 2**24  # bytes

Files = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of files, by their path in a folder."""


def copy_folder(folder: Path, url: str, replace: bool, progress: Callable[[int, int], None]) -> int:
    """Copy a folder to an fsspec path; return the number of files that were sent.

    The list of files is written before the first file, and after the last as complete. A listed file that is there with
    its size is not sent again.

    Args:
        folder: the local folder.
        url: the path; it need not exist.
        replace: replace what another copy sent there. Other files are never touched.
        progress: called after each block with the bytes that were sent and those to send.

    Raises:
        UserError: the URL is not valid, its file system is not installed, refuses or fails, or there are other files
            or contents that are not to be replaced. What was copied stays; the same call sends the rest.
    """
    try:
        return _copy(folder, _RemoteFolder(url), replace, progress)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--to {hide_logins(url)}: {error}; install the package in this environment") from error
    except Exception as error:  # file systems raise many kinds
        reason = hide_logins((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(
            f"--to {hide_logins(url)}: {reason}. Check the URL, the login and the free space there, then repeat the command: "
            "it sends what is missing"
        ) from error


def _copy(folder: Path, remote: "_RemoteFolder", replace: bool, progress: Callable[[int, int], None]) -> int:
    files = _list_files(folder)
    sizes, (listed, complete) = remote.sizes(), remote.read_list()
    if foreign := sorted(sizes.keys() - listed.keys()):
        raise UserError(
            f"--to {remote.url}: has files that were not pushed ({first_names(foreign)}); nothing was copied: give another "
            "URL"
        )
    same = {name for name, entry in files.items() if listed.get(name) == entry}
    if (other := sorted(listed.keys() - same)) and not replace:
        raise UserError(
            f"--to {remote.url}: has other contents ({first_names(other)}); nothing was copied: give another URL, or replace "
            "them with --replace"
        )
    present = {name for name in same if sizes.get(name) == files[name]["bytes"]}
    names = sorted(files.keys() - present)
    if complete and not names and not other:
        return 0
    for name in sorted(sizes.keys() - present):
        remote.remove(name)
    remote.write_list(files, complete=False)
    done, total = 0, sum(files[name]["bytes"] for name in names)
    for name in names:
        for sent in remote.send(folder / name, name):
            progress(done := done + sent, total)
    sizes = remote.sizes()
    if wrong := [name for name in names if sizes.get(name) != files[name]["bytes"]]:
        raise UserError(f"--to {remote.url}: {wrong[0]} has another size there than here; repeat the command")
    remote.write_list(files, complete=True)
    return len(names)


def _list_files(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_path(path)}
        for path in folder.rglob("*")
        if path.is_file()
    }


class _RemoteFolder:
    """A folder on an fsspec file system.

    Attributes:
        url: for messages, without a login.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = hide_logins(url.rstrip("/"))
        self._system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        self._path = path.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file that is there, the lists excepted."""
        self._system.invalidate_cache()
        try:
            entries = self._system.find(self._path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {name.removeprefix(self._path).lstrip("/"): entry["size"] for name, entry in entries.items()}
        return {name: size for name, size in sizes.items() if name not in (FILES, _UNFINISHED)}

    def read_list(self) -> tuple[Files, bool]:
        """Return the list of files, empty if there is none, and whether all of them were sent."""
        try:
            content = json.loads(self._system.cat_file(f"{self._path}/{FILES}"))
        except (FileNotFoundError, ValueError):
            return {}, False
        if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
            return {}, False
        return content["files"], content.get("complete") is True

    def write_list(self, files: Files, complete: bool) -> None:
        """Write the list. An interrupted write keeps the earlier one, without which no file would count as pushed."""
        from fsspec.implementations.local import LocalFileSystem

        content = json.dumps({"complete": complete, "files": files}, indent=2, sort_keys=True).encode()
        target = f"{self._path}/{FILES}"
        self._make_parent(target)
        if isinstance(self._system, LocalFileSystem):
            unfinished = Path(self._path, _UNFINISHED)
            unfinished.write_bytes(content)
            unfinished.replace(target)
        else:
            self._system.pipe_file(target, content)  # an object store shows an object when all of it is there

    def send(self, source: Path, name: str) -> Iterator[int]:
        """Send a file; yield the number of bytes after each block."""
        target = f"{self._path}/{name}"
        self._make_parent(target)
        with source.open("rb") as reader, self._system.open(target, "wb") as writer:
            while block := reader.read(_BLOCK):
                writer.write(block)
                yield len(block)

    def remove(self, name: str) -> None:
        self._system.rm_file(f"{self._path}/{name}")

    def _make_parent(self, path: str) -> None:
        # An object store has no folders and no paths with a leading slash; there it would create a bucket of a misspelt name.
        if path.startswith("/"):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
