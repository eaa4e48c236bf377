"""Embeddings of a pool's rows, and clusters of them that can take turns."""

from collections.abc import Callable, Iterator, Sequence, Set
from itertools import islice
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from montessori_core.program import Row
from montessori_core.selection.pools import Pool
from montessori_core.selection.texts import texts_of

CLUSTER = "cluster"
"""The column that is added: number of the row's cluster."""
_FITTED = 50_000  # rows that decide the centres, drawn at random
_CHUNK = 8192


class Vectors:
    """Embeddings of a pool's texts. Each is computed once and kept in a file, not in memory.

    Args:
        pool: the rows.
        file: an empty file, open for reading and writing.
        embed: returns the [texts, features] embeddings of texts, of norm 1.
        batch: texts that `embed` takes at once.
        on_embedded: called with the number of rows that were embedded.
    """

    def __init__(
        self,
        pool: Pool,
        file: BinaryIO,
        embed: Callable[[list[str]], np.ndarray],
        batch: int = 32,
        on_embedded: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self._pool, self._file = pool, file
        self._embed, self._batch, self._on_embedded = embed, batch, on_embedded
        self._embedded: set[int] = set()
        self._features = 0

    def add(self, positions: Set[int]) -> None:
        """Embed the rows that are not embedded yet.

        Raises:
            DataError: the pool cannot be read, or has no texts.
        """
        texts = texts_of(self._pool, positions - self._embedded)
        for rows in iter(lambda: list(islice(texts, self._batch)), []):
            vectors = np.asarray(self._embed([text for _, text in rows]), np.float32)
            self._features = vectors.shape[1]
            for (position, _), vector in zip(rows, vectors, strict=True):
                self._file.seek(position * vector.nbytes)
                self._file.write(vector.tobytes())
            self._embedded.update(position for position, _ in rows)
            self._on_embedded(len(rows))

    def of(self, position: int) -> np.ndarray:
        """Return the [features] embedding of a row that was added."""
        self._file.seek(4 * self._features * position)
        return np.frombuffer(self._file.read(4 * self._features), np.float32)


class ClusteredPool(Pool):
    """A pool with the column `cluster`; it is null for rows in no cluster.

    Args:
        pool: the rows.
        clusters: [rows, or fewer] number of each row's cluster, or -1.
    """

    def __init__(self, pool: Pool, clusters: np.ndarray) -> None:
        self._pool, self._clusters, self.name = pool, clusters, pool.name
        self.schema = None
        if pool.schema is not None:
            fields = [field for field in pool.schema.remove_metadata() if field.name != CLUSTER]
            self.schema = pa.schema([*fields, pa.field(CLUSTER, pa.int64())])

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        for position, row in enumerate(self._pool.rows(_without_cluster(columns))):
            yield row | {CLUSTER: self._cluster(position)}

    def take(self, positions: Set[int], columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        for position, row in self._pool.take(positions, _without_cluster(columns)):
            yield position, row | {CLUSTER: self._cluster(position)}

    def _cluster(self, position: int) -> int | None:
        cluster = int(self._clusters[position]) if position < len(self._clusters) else -1
        return None if cluster < 0 else cluster


def _without_cluster(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else [name for name in columns if name != CLUSTER]


def cluster_pool(pool: Pool, vectors: Vectors, positions: np.ndarray, count: int) -> ClusteredPool:
    """Put rows into clusters: k-means of their embeddings, with centres of at most 50,000 rows, drawn at random.

    Args:
        pool: the rows.
        vectors: their embeddings.
        positions: [rows] of the rows in clusters, in ascending order.
        count: number of clusters.

    Raises:
        DataError: the pool cannot be read, or has no texts.
    """
    from sklearn.cluster import KMeans

    vectors.add(set(positions.tolist()))
    drawn = np.sort(np.random.default_rng(0).permutation(positions)[:_FITTED])
    fitted = np.stack([vectors.of(position) for position in drawn.tolist()])
    means = KMeans(min(count, len(fitted)), n_init=1, random_state=0).fit(fitted)
    clusters = np.full(positions[-1] + 1, -1, np.int32)
    for start in range(0, len(positions), _CHUNK):
        chunk = positions[start : start + _CHUNK]
        clusters[chunk] = means.predict(np.stack([vectors.of(position) for position in chunk.tolist()]))
    return ClusteredPool(pool, clusters)
