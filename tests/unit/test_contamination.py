"""Contamination: consecutive words that an evaluation set shares with data."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from montessori_core.data.contamination import overlapping

WORDS = st.lists(st.text("abc1", min_size=1, max_size=2), min_size=1, max_size=12)
N = st.integers(1, 8)


def test_fixed_text_of_a_prompt_is_not_counted() -> None:
    """Of a task's prompt; here, as for gpqa_main_zeroshot, it has eight words."""
    questions = [f"Which of the {number} stars of the cluster is the oldest one?" for number in range(40)]
    items = [f"What is the correct answer to this question:{question}\nChoices:" for question in questions]
    assert not any(overlapping(items, ["So what is the correct answer to this question, A or B?"], 8))
    assert overlapping(items, [questions[7]], 8) == [number == 7 for number in range(40)]
    assert overlapping(items[:2], [items[0][:50]], 8) == [True, True]  # of two items, a phrase may be by chance
    assert overlapping(items[:1] * 3, [questions[0]], 8) == [True] * 3  # equal items have nothing else
    others = [f"Explain why {question}" for question in questions]
    of_tasks = overlapping(
        [*items, *others], ["So what is the correct answer to this question, A or B?"], 8, ["a"] * 40 + ["b"] * 40
    )
    assert not any(of_tasks)  # it is in half of all items, but in all of its task


def test_passage_of_several_questions_is_counted() -> None:
    passages = [f"In the year {number} the river rose over its banks and took the mill away." for number in range(50)]
    items = [f"{passage} {question}?" for passage in passages for question in ("Who", "What", "When", "Why")]
    assert all(overlapping(items, passages, 8))


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=5), N)
def test_item_overlaps_if_it_shares_consecutive_words(items: list[list[str]], data: list[list[str]], n: int) -> None:
    shares = [runs(item, min(n, len(item))) for item in items]
    counts = Counter(run for share in shares for run in share)
    fixed = {run for run, count in counts.items() if count >= 3 and count > len(items) / 2}
    own = [share - fixed or share for share in shares]
    expected = [
        any(share & runs(text, min(n, len(item))) for text in data) for item, share in zip(items, own, strict=True)
    ]
    texts = [" ".join(text) for text in data]
    assert overlapping([" ".join(item) for item in items], iter(texts), n) == expected
    assert overlapping([" ".join(item) for item in items], reversed(texts), n) == expected


@given(WORDS, WORDS, N, st.sampled_from([" ", ", ", "--", "\n", "_", ' "']))
def test_overlap_ignores_case_and_punctuation(item: list[str], text: list[str], n: int, between: str) -> None:
    plain = overlapping([" ".join(item)], [" ".join(text)], n)
    assert overlapping([between.join(item).upper()], [" ".join(text)], n) == plain
    assert overlapping([" ".join(item)], [f"({between.join(text)}!)".upper()], n) == plain


@given(st.text().filter(lambda text: any(character.isalnum() for character in text)), st.text(), N)
def test_an_exact_copy_always_overlaps(item: str, before: str, n: int) -> None:
    assert overlapping([item], [before, item], n) == [True]
    assert overlapping([item], [f"{before}\n{item}\n{before}"], n) == [True]


@given(st.lists(st.text("abcä中 .,")), st.lists(st.text("xyzö文 .,")), N)
def test_disjoint_vocabularies_never_overlap(items: list[str], data: list[str], n: int) -> None:
    assert overlapping(items, data, n) == [False] * len(items)


def test_overlap_needs_complete_consecutive_words() -> None:
    items = ["How do I dice an onion without crying?", "Dice an onion", "...", "an onion"]
    assert overlapping(items, ["Tell me: how do I DICE an Onion -- quickly"], 6) == [True, True, False, True]
    assert overlapping(items, ["I dice, then I chop an onions"], 3) == [False] * 4
    assert overlapping(items, ["dice an", "onion"], 3) == [False] * 4  # words of two texts are not consecutive
