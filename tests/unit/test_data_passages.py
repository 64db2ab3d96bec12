import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmd2v.data.damage import Damage, DamageKind
from mmd2v.data.sources.passages import ends_sentence, passages
from mmd2v.data.sources.text import words_of


def cut(text, most, piece=None):
    pieces = [text] if piece is None else [text[at : at + piece] for at in range(0, len(text), piece)]
    return list(passages(words_of(pieces, "here"), most))


def sentence(count, word="w"):
    return " ".join([f"{word}{n}" for n in range(count - 1)] + ["end."])


def test_whole_paragraphs_are_put_together_while_they_fit():
    a, b, c = sentence(4, "a"), sentence(3, "b"), sentence(6, "c")
    assert cut(f"{a}\n\n{b}\n \n\n{c}\n", 8) == [f"{a} {b}", c]


def test_a_paragraph_that_fits_into_a_passage_is_never_cut():
    a, b = sentence(5, "a"), f"{sentence(3, 'b')} {sentence(4, 'c')}"
    assert cut(f"{a}\n\n{b}", 8) == [a, b]


def test_a_longer_paragraph_is_cut_behind_sentences():
    a, b, c = sentence(3, "a"), sentence(4, "b"), sentence(5, "c")
    assert cut(f"{a} {b} {c}", 8) == [f"{a} {b}", c]
    head = sentence(2, "h")
    assert cut(f"{head}\n\n{a} {b} {c}", 8) == [f"{head} {a}", b, c]


def test_a_longer_sentence_is_cut_behind_words():
    words = [f"w{n}" for n in range(20)]
    assert cut(" ".join(words), 8) == [" ".join(words[:8]), " ".join(words[8:16]), " ".join(words[16:])]


def test_lines_of_a_hard_wrapped_paragraph_belong_together():
    assert cut("one two\r\nthree four\r\n\r\nfive\r\n", 4) == ["one two three four", "five"]


def test_nothing_gives_nothing():
    assert cut("", 3) == cut(" \n\n \n", 3) == []


@pytest.mark.parametrize("word", ["end.", "end!", "why?", "so…", 'said."', "it.)", "了。", "I.", "U.S.A.", "end.”"])
def test_sentence_ends(word):
    assert ends_sentence(word)


@pytest.mark.parametrize("word", ["Mr.", "(Dr.", "e.g.", "J.", "word", "3.5", "a.b", "“Mrs."])
def test_no_sentence_ends(word):
    assert not ends_sentence(word)


WORDS = st.sampled_from(["a", "bb", "c.", "d!", "Mr.", "e?”", "f"])
SPACES = st.sampled_from([" ", "  ", "\n", "\n\n", " \n \n\n", "\t", "\r\n\r\n"])


@given(st.lists(st.tuples(WORDS, SPACES), max_size=60), st.integers(1, 12), st.integers(1, 9))
def test_every_word_once_none_too_long_and_pieces_change_nothing(parts, most, piece):
    text = "".join(word + space for word, space in parts)
    found = cut(text, most)
    assert " ".join(found).split() == [word for word, _ in parts]
    assert all(1 <= len(passage.split()) <= most for passage in found)
    assert cut(text, most, piece) == found
    # A paragraph that fits is in one passage, whole.
    paragraphs = [p.split() for p in text.replace("\r", "").replace(" \n", "\n").split("\n\n")]
    joined = [f" {passage} " for passage in found]
    for paragraph in filter(None, paragraphs):
        if len(paragraph) <= most:
            assert any(f" {' '.join(paragraph)} " in passage for passage in joined)


def test_what_has_no_words_is_no_text():
    with pytest.raises(Damage) as caught:
        list(words_of(["x" * 50_000, "x" * 50_000], "corpus"))
    assert caught.value.kind is DamageKind.CAPTION_TOO_LONG and str(caught.value).startswith("corpus: ")


def test_a_document_of_any_length_takes_little_memory():
    import tracemalloc

    def pieces():
        for _ in range(2_000):
            yield "some words without any end " * 40

    tracemalloc.start()
    count = sum(1 for _ in passages(words_of(pieces(), "here"), 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_000 * 40 * 5 // 256 + 1
    assert peak < 1_000_000  # of a text of two megabytes
