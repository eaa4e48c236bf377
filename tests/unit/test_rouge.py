"""ROUGE-L: the values of the `rouge-score` package, words of any script, and the verdicts of comparing all pairs."""

import itertools
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from montessori_core.data import rouge
from montessori_core.data.rouge import RougeIndex, f_measure
from montessori_core.data.words import words
from montessori_core.errors import DataError
from support.rouge import accept_all

SCORER = RougeScorer(["rougeL"])
WORDS = st.sampled_from(
    ["write", "a", "poem", "the", "sea", "Sea", "SEA,", "two", "lines.", "42", "x_1", "“naive”", "—", "…", "I'm", "I’m"]
)
ENGLISH = st.lists(WORDS, max_size=14).map(" ".join) | st.text(st.characters(codec="ascii"), max_size=30)
TEXTS = ENGLISH | st.text(max_size=30)
LIMITS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@st.composite
def variants(draw: st.DrawFn) -> list[str]:
    """Draw similar texts of different lengths, with repeated, replaced and new words."""
    base = draw(st.lists(st.integers(0, 12), min_size=1, max_size=40))
    texts = []
    for number in range(draw(st.integers(2, 20))):
        start = draw(st.integers(0, len(base) - 1))
        text = base[start : draw(st.integers(start, len(base)))]
        for place in draw(st.lists(st.integers(0, 39), max_size=8)):
            if place < len(text):
                text[place] = draw(st.integers(0, 12) | st.just(100 + number))
        texts.append(" ".join(f"w{word}" for word in text))
    return texts


@given(ENGLISH, ENGLISH)
def test_f_measure_equals_rouge_score_in_english(first: str, second: str) -> None:
    assert f_measure(first, second) == SCORER.score(first, second)["rougeL"].fmeasure


@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=12), LIMITS)
def test_acceptance_equals_brute_force(known: list[str], texts: list[str], limit: float) -> None:
    kept, expected = list(known), []
    for text in texts:
        expected.append(all(f_measure(other, text) <= limit for other in kept))
        if expected[-1]:
            kept.append(text)
    assert accept_all(RougeIndex(known, limit), texts) == expected


@given(variants(), LIMITS)
def test_acceptance_of_variants_equals_brute_force(texts: list[str], limit: float) -> None:
    accepted, kept = RougeIndex(max_rouge_l=limit), list[str]()
    for text in texts:
        scores = [f_measure(other, text) for other in kept]
        above = [score for score in scores if score > limit]
        assert accepted.nearest(text) == (scores.index(max(above)) if above else None)
        assert accept_all(accepted, [text]) == [not above]
        kept += [] if above else [text]
    assert len(accepted) == len(kept)


SENTENCES = {
    "Russian": ("Назови три реки в Европе.", "Напиши стихи о холодной зиме."),
    "Greek": ("Γράψε ένα ποίημα για τη θάλασσα.", "Πόσα είναι δύο και δύο;"),
    "Arabic": ("اكتب قصيدة عن البحر", "كم عدد أيام السنة"),
    "Hebrew": ("כתוב שיר על הים הגדול", "כמה ימים יש בשנה"),
    "Hindi": ("समुद्र के बारे में एक कविता लिखो", "साल में कितने दिन होते हैं"),
    "Tamil": ("கடலைப் பற்றி ஒரு கவிதை எழுது", "வருடத்தில் எத்தனை நாட்கள்"),
    "Korean": ("바다에 대한 시를 써 줘", "일 년은 며칠인가요"),
    "Chinese": ("写一首关于大海的诗。", "一年有多少天？"),
    "Japanese": ("海についての詩を書いてください。", "一年は何日ありますか？"),
    "Thai": ("เขียนบทกวีเกี่ยวกับทะเล", "หนึ่งปีมีกี่วัน"),
    "Khmer": ("សរសេរកំណាព្យអំពីសមុទ្រ", "មួយឆ្នាំមានប៉ុន្មានថ្ងៃ"),
    "French": ("Écris un poème sur l'été.", "Où êtes-vous né ?"),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_similarity_is_seen_in_any_script(language: str) -> None:
    first, other = SENTENCES[language]
    assert f_measure(first, first) == 1.0
    assert f_measure(first, unicodedata.normalize("NFD", first).upper()) == 1.0
    assert f_measure(first, other) < 0.6
    start = first[: len(first) * 2 // 3]
    assert 0.4 < f_measure(first, start) < 1.0
    assert accept_all(RougeIndex(), [first, first, other, f"{first}!", first]) == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Café-NAÏVE x_1", ["café", "naïve", "x", "1"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("GPT-4は、強い。", ["gpt", "4", "は", "強", "い"]),
        ("มีกี่วัน", ["มี", "กี่", "วั", "น"]),
        ("2024년 3월", ["2024년", "3월"]),
        ("\u0301 — …", []),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]


def test_nearest_is_first_of_most_similar() -> None:
    known = ["one two three four nine", "one two three four ten", "one two three four", "one two three four ten"]
    texts = ["one two three four eleven", known[1], "one two three four", "unseen words", "", "—"]
    assert [RougeIndex(known).nearest(text) for text in texts] == [2, 1, 2, None, None, None]
    assert RougeIndex([*known[:2], known[3]]).nearest(texts[0]) == 0


def test_rouge_limit_is_exact() -> None:
    for first, second in itertools.product(range(25, 40), repeat=2):
        texts = [" ".join(f"w{number}" for number in range(length)) for length in (first, second)]
        f = SCORER.score(*texts)["rougeL"].fmeasure
        assert RougeIndex(texts[:1], f).nearest(texts[1]) is None
        assert RougeIndex(texts[:1], math.nextafter(f, 0)).nearest(texts[1]) == 0, (first, second)


def test_words_of_rejected_texts_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rouge, "_LAST", 9)
    index = RougeIndex(["one two three four", "five six seven eight"])
    for number in range(30):
        assert index.nearest(f"one two three four new{number}") == 0
        assert index.nearest(f"a{number} b{number} c{number} seven eight") is None
    with pytest.raises(DataError, match="more than 8 different words"):
        index.add("nine")


@given(st.lists(st.sampled_from("abcdef"), max_size=6), st.lists(st.sampled_from("abcdefghijkl"), max_size=12), LIMITS)
def test_unknown_words_match_nothing(known: list[str], text: list[str], limit: float) -> None:
    """Also if none of the characters are left for them."""
    score = f_measure(" ".join(known), " ".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "_LAST", len(set(known)) + 1)
        assert RougeIndex([" ".join(known)], limit).nearest(" ".join(text)) == (0 if score > limit else None)


def test_verdicts_do_not_depend_on_batching() -> None:
    texts = [f"explain topic {i % 97} with {i % 13} examples and {i % 5} remarks for class {i % 3}" for i in range(700)]
    together = accept_all(RougeIndex(), texts)
    one_by_one = RougeIndex()
    assert [accept_all(one_by_one, [text])[0] for text in texts] == together
    assert 0 < sum(together) < len(texts)
