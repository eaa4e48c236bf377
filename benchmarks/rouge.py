"""Compare ROUGE-L deduplication with the index and by comparing all pairs.

    python benchmarks/rouge.py [--sizes 1000 10000 100000] [--texts FILE]

Built-in cases: *drawn* samples words and lengths from the built-in seed pool independently, so that no texts are too similar;
*variants* takes its instructions and replaces 10 % to 90 % of their words, so that many are close to the limit. `--texts`
adds the lines of a file, one candidate each.

rapidfuzz compares all pairs whose lengths allow F above the limit, on a sample of blocks; its verdicts must equal those of
the index. `rouge-score` compares a sample of pairs. Both times are extrapolated to all pairs. Each row is measured in a
separate process, on one thread, in processor time, which other programs on the machine change little.
"""

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from rouge_score.rouge_scorer import RougeScorer

from montessori_core.config import DataSource
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.sources import read_tasks
from montessori_core.data.words import words

LIMIT = 0.7
BLOCK = 256
SAMPLED_BLOCKS = 8
SAMPLED_PAIRS = 2000
HEADER = """\
| candidates | kept | index, s | pairs, s | rouge-score, s | pairs / index | rouge-score / index | memory, MB |
|---|---|---|---|---|---|---|---|"""


def drawn(count: int) -> list[str]:
    """Return texts of words drawn from the seed pool."""
    draw, seeds = random.Random(0), _seeds()
    vocabulary = [word for seed in seeds for word in seed]
    return [" ".join(draw.choices(vocabulary, k=len(draw.choice(seeds)))) for _ in range(count)]


def variants(count: int) -> list[str]:
    """Return instructions of the seed pool with some of their words replaced by others."""
    draw, seeds = random.Random(0), _seeds()
    vocabulary = [word for seed in seeds for word in seed]
    texts = []
    for _ in range(count):
        share = draw.uniform(0.1, 0.9)
        text = [draw.choice(vocabulary) if draw.random() < share else word for word in draw.choice(seeds)]
        texts.append(" ".join(text))
    return texts


def measure(name: str, texts: Sequence[str]) -> str:
    """Return a row of the table."""
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.process_time()
    accepted = RougeIndex(max_rouge_l=LIMIT)
    verdicts: list[bool] = []
    for text in texts:
        verdicts.append(accepted.nearest(text) is None)
        if verdicts[-1]:
            accepted.add(text)
    indexed = time.process_time() - started
    memory = (process.memory_info().rss - before) / 2**20

    # Without an index, each candidate is compared with all candidates accepted before it.
    pairs = int(np.cumsum(verdicts).sum()) - sum(verdicts)
    draw = random.Random(0)
    blocks = range(0, len(texts), BLOCK)
    step = max(1, len(blocks) // SAMPLED_BLOCKS)
    sampled = blocks[step // 2 :: step]  # evenly spaced: later blocks are compared with more texts
    pair_seconds = _compare(texts, verdicts, sampled) * len(blocks) / len(sampled)
    scorer = RougeScorer(["rougeL"])
    started = time.process_time()
    for _ in range(SAMPLED_PAIRS):
        scorer.score(draw.choice(texts), draw.choice(texts))
    rouge_score = (time.process_time() - started) / SAMPLED_PAIRS * pairs
    return (
        f"| {name}, {len(texts):,} | {sum(verdicts):,} | {indexed:.1f} | {pair_seconds:,.1f} | {rouge_score:,.0f} "
        f"| {pair_seconds / indexed:.1f} | {rouge_score / indexed:,.0f} | {memory:.0f} |"
    )


def _seeds() -> list[list[str]]:
    return [
        words(task.instruction) for task in read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    ]


def _compare(texts: Sequence[str], verdicts: Sequence[bool], starts: Sequence[int]) -> float:
    """Return the seconds to compare the blocks at `starts` with all accepted texts before and within them; check verdicts."""
    vocabulary: dict[str, int] = {}
    codes = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
    # One character per word; surrogate code points are skipped.
    candidates = ["".join(chr(code if code < 0xD800 else code + 0x800) for code in text) for text in codes]
    seconds = 0.0
    for start in starts:
        block = candidates[start : start + BLOCK]
        accepted = [text for text, kept in zip(candidates[:start], verdicts, strict=False) if kept]
        started = time.process_time()
        near = np.asarray(_near(block, accepted).any(axis=1))
        within = _near(block, block)
        kept: list[int] = []
        for index in range(len(block)):
            if not near[index] and not within[index, kept].any():
                kept.append(index)
        seconds += time.process_time() - started
        assert kept == list(np.flatnonzero(verdicts[start : start + BLOCK]))
    return seconds


def _near(first: list[str], second: list[str]) -> npt.NDArray[np.bool_]:
    """Return a [first, second] array: whether F is above the limit. Pairs whose lengths exclude it are not compared."""
    near = np.zeros((len(first), len(second)), dtype=bool)
    lengths = np.array([len(text) for text in first]), np.array([len(text) for text in second])
    for length in np.unique(lengths[0]):
        rows = np.flatnonzero(lengths[0] == length)
        bound = 2 * np.minimum(lengths[1], length) / np.maximum(lengths[1] + length, 1)
        columns = np.flatnonzero(bound > LIMIT - 1e-9)
        if len(columns):
            pair = [first[row] for row in rows], [second[column] for column in columns]
            common = cdist(*pair, scorer=LCSseq.similarity, dtype=np.int32)
            with np.errstate(divide="ignore", invalid="ignore"):
                precision, recall = common / lengths[1][columns], common / length
                near[np.ix_(rows, columns)] = 2 * precision * recall / (precision + recall) > LIMIT
    return near


def main() -> None:
    """Print a table with one row per case and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of candidates")
    parser.add_argument("--texts", type=Path, help="file with a candidate per line, as an additional case")
    arguments = parser.parse_args()
    print(HEADER)  # noqa: T201
    lines = arguments.texts.read_text(encoding="utf-8").splitlines() if arguments.texts else []
    for size in arguments.sizes:
        cases = {"drawn": drawn(size), "variants": variants(size)}
        if lines:
            cases[arguments.texts.name] = lines[:size]
        for name, texts in cases.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                print(process.submit(measure, name, texts).result(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
