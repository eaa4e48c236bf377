"""ROUGE-L filtering: 10,000 candidates against 10,000 accepted instructions on one core, beside `rouge-score`.

    python benchmarks/rouge.py [--size 10000]

Texts have the words and lengths of the built-in seed pool. `rouge-score` is timed on a sample of pairs and extrapolated.
"""

import argparse
import random
import time

from rouge_score.rouge_scorer import RougeScorer

from montessori_core.config import DataSource
from montessori_core.rouge import Accepted, words
from montessori_core.sources import read_tasks


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000, help="candidates, and accepted instructions")
    size: int = parser.parse_args().size

    seeds = [words(task.text) for task in read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)]
    vocabulary = [word for seed in seeds for word in seed]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(vocabulary, k=len(draw.choice(seeds)))) for _ in range(2 * size)]
    accepted, candidates = texts[:size], texts[size:]

    known = Accepted(accepted)
    started = time.perf_counter()
    kept = sum(known.add_all(candidates))
    ours = time.perf_counter() - started

    scorer, pairs = RougeScorer(["rougeL"]), 3000
    sample = [(draw.choice(accepted), draw.choice(candidates)) for _ in range(pairs)]
    started = time.perf_counter()
    for first, second in sample:
        scorer.score(first, second)
    comparisons = size * size + size * (size - 1) / 2
    theirs = (time.perf_counter() - started) / pairs * comparisons

    print(f"candidates {size}, accepted before {size}, kept {kept}")  # noqa: T201
    print(f"montessori_core.rouge  {ours:10.1f} s")  # noqa: T201
    print(f"rouge-score            {theirs:10.0f} s (extrapolated from {pairs} of {comparisons:.3g} pairs)")  # noqa: T201
    print(f"ratio                  {theirs / ours:10.0f}")  # noqa: T201


if __name__ == "__main__":
    main()
