"""The tokenizer is deterministic, knows every word of the captions, has pieces for any English, and
transformers reads it alike.
"""

from itertools import islice

import pytest

from training.tokenizer import build, corpus, pieces, save

ENGLISH = [
    "", "A Large RED Circle, on a White background!", "the quick brown fox jumps over the lazy dog",
    "  two   spaces\nnewline\ttab",
    "CIRCLES and squares; it's 100% #1 (x_y) [z] {~}`^|\\ <>?/", "a cat", "</s> within",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return build(pieces(corpus()))


def test_same_file_every_time(folder, tmp_path):
    save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_special_ids_and_size(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 400


def test_every_caption_is_whole_words(tokenizer):
    for text in islice(corpus(seed=9, count=500), 3000):
        encoded = tokenizer.encode(text)
        words = [token for token in encoded.tokens[:-1] if token not in (",", ".")]
        assert [word.removeprefix("\u2581") for word in words] == text.replace(",", "").replace(
            ".", ""
        ).split()
        assert encoded.ids[-1] == 1
        assert len(encoded.ids) <= 30


@pytest.mark.parametrize("text", ENGLISH)
def test_any_english_has_pieces_in_small_letters(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert 2 not in encoded.ids
    assert encoded.ids == tokenizer.encode(text.lower()).ids


def test_other_scripts_are_unknown_not_errors(tokenizer):
    assert 2 in tokenizer.encode("\u65e5\u672c a circle").ids


def test_transformers_reads_the_same(folder, tokenizer):
    import transformers

    readers = [
        cls.from_pretrained(str(folder)) for cls in (transformers.T5TokenizerFast, transformers.AutoTokenizer)
    ]
    for text in [*ENGLISH, *islice(corpus(seed=10, count=50), 300)]:
        assert [reader(text).input_ids for reader in readers] == [tokenizer.encode(text).ids] * 2
    assert all(
        (reader.pad_token_id, reader.eos_token_id, reader.unk_token_id) == (0, 1, 2) for reader in readers
    )
    assert all(len(reader) == tokenizer.get_vocab_size() for reader in readers)
    padded = readers[0](["a red circle"], padding="max_length", max_length=8)
    assert padded.attention_mask == [[1, 1, 1, 1, 0, 0, 0, 0]]
