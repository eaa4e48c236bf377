"""Check the files of a Hugging Face data set before the library `datasets` decompresses them without a bound.

The library decides by name or by content whether a file is compressed, and how. So both have to say the same here.
"""

import lzma
import re
from pathlib import PurePosixPath
from typing import Any

import datasets
from datasets.utils.extract import Extractor
from datasets.utils.py_utils import NestedDataStructure

from montessori_core.data.files import COMPRESSIONS, DataFile
from montessori_core.data.readers import check_parquet
from montessori_core.errors import DataError

_FORMATS = {"": None, ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_MAGIC = (
    *(b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh", b"\x04\x22\x4d\x18"),  # gzip, xz, zstd, bz2, lz4
    *(b"PK\3\4", b"PK\5\6", b"PK\7\b", b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c"),  # zip, rar, 7z
)
_ARCHIVES = {"zip", "eval", "tar", "tgz", "7z", "rar", "lz4", "bz2"}
_HEAD = 64  # bytes


class CheckedDownloads(datasets.DownloadManager):  # type: ignore[misc]
    """Downloads files as `datasets` does, and refuses archives and decompression bombs."""

    def download(self, url_or_urls: Any) -> Any:
        """Return the paths of the files.

        Raises:
            DataError: a file is damaged, or is an archive or a decompression bomb.
        """
        names = [str(url) for url in NestedDataStructure(url_or_urls).flatten()]
        for name in names:
            if "::" in name or _is_refused(name):
                raise _refusal(name)
        paths = super().download(url_or_urls)
        for name, path in zip(names, NestedDataStructure(paths).flatten(), strict=True):
            _check_content(DataFile(str(path), name))
        return paths


def _is_refused(name: str) -> bool:
    """Whether a name is that of an archive, or hides how the file is compressed."""
    *others, last = name.rpartition("/")[2].lower().split(".")
    last = re.split("[-_?]", last)[0]  # the extension, for the library
    if last in _ARCHIVES or (others and f".{others[-1]}" in (".tar", *COMPRESSIONS)):
        return True
    return f".{last}" in COMPRESSIONS and PurePosixPath(name.lower()).suffix != f".{last}"


def _check_content(file: DataFile) -> None:
    with file.open() as stream:
        head = stream.read(_HEAD)
        if _is_compressed(head):
            raise _refusal(file.name)
        while file.compression and stream.read(2**20):
            pass
    # After the bound is checked: this looks for an archive inside of compressed files.
    if Extractor.infer_extractor_format(file.path) != _FORMATS[file.compression]:
        raise _refusal(file.name)
    if head.startswith(b"PAR1") and not file.compression:
        check_parquet(file)


def _is_compressed(head: bytes) -> bool:
    if head.startswith(_MAGIC):
        return True
    try:
        return bool(lzma.LZMADecompressor().decompress(head, 1))  # .lzma has no magic number
    except lzma.LZMAError:
        return False


def _refusal(name: str) -> DataError:
    return DataError(
        f"{name}: an archive, or compressed in a way that its name does not say, so that its size is unknown; unpack it, and "
        "name the files"
    )
