"""ROUGE-L: the same number as the `rouge-score` package, and the same verdicts as comparing all pairs with it."""

from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from montessori_core.rouge import Accepted, f_measure

SCORER = RougeScorer(["rougeL"])
WORDS = st.sampled_from(
    ["write", "a", "poem", "the", "sea", "Sea", "SEA,", "two", "lines.", "42", "x_1", "naïve", "—", "ß", "I'm"]
)
TEXTS = st.lists(WORDS, max_size=14).map(" ".join) | st.text(max_size=30)


@settings(max_examples=500, deadline=None)
@given(TEXTS, TEXTS)
def test_f_measure_equals_rouge_score(first: str, second: str) -> None:
    assert f_measure(first, second) == SCORER.score(first, second)["rougeL"].fmeasure


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=12), st.sampled_from([0.3, 0.5, 0.7, 0.9]))
def test_acceptance_equals_comparing_every_pair(known: list[str], texts: list[str], limit: float) -> None:
    kept, expected = list(known), []
    for text in texts:
        expected.append(all(SCORER.score(other, text)["rougeL"].fmeasure <= limit for other in kept))
        if expected[-1]:
            kept.append(text)
    assert Accepted(known, limit).add_all(texts) == expected


def test_verdicts_do_not_depend_on_how_texts_arrive() -> None:
    texts = [f"explain topic {i % 97} with {i % 13} examples and {i % 5} remarks for class {i % 3}" for i in range(700)]
    together = Accepted().add_all(texts)
    one_by_one = Accepted()
    assert [one_by_one.add_all([text])[0] for text in texts] == together
    assert 0 < sum(together) < len(texts)
