import io
import random

import pytest

from tinydiff.io.tokenizer import load_tokenizer, prompt_clean
from tinydiff.records import UserError

sentencepiece = pytest.importorskip("sentencepiece")

VOCABULARY = """red orange yellow green blue purple black white circle square triangle star ring small large left right top bottom
centre a on the background moving of above"""

TEXTS = (
    "a red circle",
    "",
    " leading and trailing  ",
    "two  spaces\tand a tab\nand a line",
    "special </s> inside <pad> a text",
    "<unk>",
    "unknown 日本語 runs?! together",
    "large blue ring moving left " * 9,
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A T5-style unigram model of some 60 pieces in a folder of its own."""
    draw, words = random.Random(0), VOCABULARY.split()
    lines = (" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(400))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=60, hard_vocab_limit=False, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2, num_threads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def reference(spiece):
    """transformers' own T5 tokenizer over the same pieces. (Its reader of spiece.model needs protobuf, so the pieces are handed over.)"""
    transformers = pytest.importorskip("transformers")
    engine = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    pieces = [(engine.id_to_piece(index), engine.get_score(index)) for index in range(engine.get_piece_size())]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


@pytest.fixture(scope="module")
def json_folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    reference.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["spiece", "json_folder"])
@pytest.mark.parametrize("length", [4, 16, 64])
def test_same_ids_as_transformers(kind, length, reference, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    for text in TEXTS:
        expected = reference(text, padding="max_length", max_length=length, truncation=True)
        tokens = tokenizer.encode(text, length)
        assert tokens.ids == expected.input_ids, text
        assert tokens.mask == expected.attention_mask, text


@pytest.mark.parametrize("kind", ["spiece", "json_folder"])
def test_truncation_is_counted_and_keeps_the_end(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "red " * 20
    whole = tokenizer.encode(text, 100)
    length = sum(whole.mask)
    assert whole.truncated == 0 and whole.ids[length - 1] == tokenizer.eos and set(whole.ids[length:]) == {tokenizer.pad}
    assert tokenizer.encode(text, length) == (whole.ids[:length], [1] * length, 0)
    cut = tokenizer.encode(text, length - 3)
    assert cut.truncated == 3 and cut.ids == [*whole.ids[: length - 4], tokenizer.eos] and set(cut.mask) == {1}


def test_json_is_preferred_and_its_own_padding_ignored(json_folder, spiece, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    engine.enable_truncation(3)
    engine.enable_padding(length=40)
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"never read")
    assert load_tokenizer(tmp_path).encode("a red circle", 9) == load_tokenizer(spiece).encode("a red circle", 9)


def test_unusable_files(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor spiece\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"spiece\.model' is not a usable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json' is not a usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text, clean",
    [
        ("  a \t red\n\n circle ", "a red circle"),
        ("&amp;lt;b&amp;gt; &amp;amp; &quot;x&quot;", '<b> & "x"'),
        ("âœ” fixed mojibake", "✔ fixed mojibake"),
        ("“curly” ﬁne", '"curly" fine'),
        ("", ""),
    ],
)
def test_prompt_clean(text, clean):
    assert prompt_clean(text) == clean


def test_prompt_clean_is_the_reference():
    reference = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    for text in (*TEXTS, "&amp;lt;", "âœ” No problems", "a\u00a0b\u3000c", "Größe ½ ﬁ"):
        assert prompt_clean(text) == reference(text)
