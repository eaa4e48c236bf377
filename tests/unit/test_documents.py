"""Documents become passages; what cannot be read is named."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.data import documents
from montessori_core.data.documents import read_passages, split_passages
from montessori_core.data.words import words
from montessori_core.errors import DataError, UserError

SENTENCE = "The lamp of the pump blinks twice when the water is warm enough. "


def test_documents_of_a_folder_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub" / ".trash").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("\ufeff" + SENTENCE, encoding="utf-8")
    (tmp_path / "sub" / "a.md").write_text(f"# Pump\n\n{SENTENCE}\n\n{SENTENCE * 3}")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    for hidden in (".hidden.md", "sub/.hidden.md", "sub/.trash/b.md"):
        (tmp_path / hidden).write_text(SENTENCE)
    passages = read_passages(str(tmp_path), 40)
    assert [passage.example_id for passage in passages] == ["b.txt#1", "sub/a.md#1", "sub/a.md#2"]
    assert passages[0].instruction == SENTENCE.strip()
    assert passages[1].instruction == f"# Pump\n\n{SENTENCE.strip()}"
    assert [task.instruction for task in read_passages(str(tmp_path / "*.txt"), 40)] == [SENTENCE.strip()]
    assert [task.example_id for task in read_passages(str(tmp_path / "b.txt"), 40)] == ["b.txt#1"]
    monkeypatch.chdir(tmp_path / "sub")
    assert [task.example_id for task in read_passages("../*.txt", 40)] == ["../b.txt#1"]


@given(
    st.lists(
        st.sampled_from([SENTENCE, "Word ", "\n\n", "请用两句话解释为什么天空是蓝色的。", "x" * 50, "\x00"]),
        max_size=60,
    )
)
def test_passages_keep_limit_and_order_of_words(parts: list[str]) -> None:
    """At most a short passage is left out before each passage, and at the end."""
    text = "".join(parts)
    passages = split_passages(text, 20)
    assert all(8 <= len(words(passage)) <= 20 for passage in passages)
    kept = [word for passage in passages for word in words(passage)]
    given = words(text.replace("\x00", ""))
    assert len(given) - len(kept) <= 7 * (len(passages) + 1)
    rest = iter(given)
    assert all(word in rest for word in kept)


def test_text_without_sentences_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(documents, "words", lambda text: lengths.append(len(text)) or words(text))
    text = "word " * 20_000
    assert split_passages(text, 20) == [" ".join(["word"] * 20)] * 1000
    assert sum(lengths) < 30 * len(text)


def test_lone_surrogates_are_left_out() -> None:
    assert split_passages(f"{SENTENCE}\ud800", 40) == [SENTENCE.strip()]


def test_pdf_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "guide.pdf").write_bytes(pdf_with(SENTENCE))
    (passage,) = read_passages(str(tmp_path), 40)
    assert passage.example_id == "guide.pdf#1"
    assert passage.instruction == SENTENCE.strip()
    (tmp_path / "guide.pdf").write_bytes(b"%PDF-1.7\nbroken")
    with pytest.raises(DataError, match=r"guide.pdf: not a readable PDF .* decrypt, repair or remove it"):
        read_passages(str(tmp_path), 40)


def test_pdf_without_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "guide.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match=r"guide.pdf: PDF needs the package pypdf .* 'montessori\[documents\]'"):
        read_passages(str(tmp_path), 40)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"", "no document there; give a file, folder or glob of .txt, .md, .markdown, .pdf"),
        ("a.txt", b"", "no passage of at least 8 words in 1 documents"),
        ("a.txt", b"\xff\xfe\x00", r"a.txt: not UTF-8 text \(byte 0\); convert or remove the file"),
        ("a.txt", SENTENCE.encode() * 20, "a.txt: 0 MiB, more than 0; split the document"),
    ],
)
def test_unusable_documents_are_named(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MOST_BYTES", 500)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_passages(str(tmp_path), 40)


def test_missing_document_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"synthesis.strategy.documents: .*/no.md: no document there"):
        read_passages(str(tmp_path / "no.md"), 40)


def pdf_with(text: str) -> bytes:
    """Return a PDF with one line of text."""
    drawn = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(content)
    content += b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\n" % table
    return content + b"startxref\n%d\n%%%%EOF\n" % start
