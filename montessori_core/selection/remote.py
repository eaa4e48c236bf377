"""Pools by fsspec URL: copied to a temporary folder, since a choice reads its pool several times."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from montessori_core.config import DataSource
from montessori_core.data.files import DataFile
from montessori_core.data.shards import find_remote, is_url
from montessori_core.errors import DataError
from montessori_core.selection.pools import FilesPool, Pool, check_texts, open_pool
from montessori_core.selection.targets import INFLUENCE_COLUMN, open_pools


@contextmanager
def open_any_pools(
    paths: Sequence[str], examples: DataSource | None = None, form: str | None = None
) -> Iterator[tuple[Pool, list[str]]]:
    """Yield the pool of paths and its columns of scores, as `open_pools`; a single one may be an fsspec URL.

    Raises:
        DataError: as `open_pools`, or a URL cannot be read.
    """
    url = next(filter(is_url, paths), None)
    if url is None:
        yield open_pools([Path(path) for path in paths], examples, form)
        return
    if len(paths) > 1:
        raise DataError(
            f"{url}: only a single pool is read from a URL; copy the tables to this machine, and give these"
        )
    with TemporaryDirectory(prefix="montessori-pool-") as folder:
        yield _copied_pool(url, Path(folder), examples, form), [INFLUENCE_COLUMN]


def _copied_pool(url: str, folder: Path, examples: DataSource | None, form: str | None) -> Pool:
    files = find_remote(url, "train", field="")
    copies = [folder / f"part-{number:05d}{file.kind}{file.compression}" for number, file in enumerate(files)]
    for file, copy in zip(files, copies, strict=True):
        file.copy(copy)
    if len(copies) == 1 and copies[0].suffix == ".parquet":
        return open_pool(copies[0], examples, form, name=url)
    pool = FilesPool(url, [DataFile(str(copy), file.name) for file, copy in zip(files, copies, strict=True)])
    check_texts(pool, examples, form)
    return pool
