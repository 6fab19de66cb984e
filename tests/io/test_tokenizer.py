import io
import json
import random

import pytest
import sentencepiece
import tokenizers
import transformers

from tests import vocabularies
from tinydiff.io.tokenizer import load_tokenizer
from tinydiff.records import UserError

VOCABULARY = """red orange yellow green blue purple black white circle square triangle star ring small large
left right top bottom
centre a on the background moving of above"""

TEXTS = (
    "a red circle",
    "",
    " leading and trailing  ",
    "two  spaces\tand a tab\nand a line",
    "special </s> inside <pad> a text",
    "<unk>",
    "<extra_id_3>",
    "a red<extra_id_0>circle <extra_id_99> and  <extra_id_100> <extra_id_10>",
    "unknown 日本語 runs?! together",
    "large blue ring moving left " * 9,
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A T5-style unigram model of some 60 pieces in a directory of its own."""
    draw, words = random.Random(0), VOCABULARY.split()
    lines = (" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(400))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="unigram", minloglevel=2, num_threads=1,
        vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("spiece")
    (directory / "spiece.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="module")
def reference(spiece):
    """transformers' own T5 tokenizer over the same pieces. (Its reader of spiece.model needs protobuf, so the
    pieces are handed over.)
    """
    engine = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    pieces = [
        (engine.id_to_piece(index), engine.get_score(index)) for index in range(engine.get_piece_size())
    ]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return transformers.T5TokenizerFast(vocab=[*pieces, *sentinels], extra_ids=100)


@pytest.fixture(scope="module")
def json_folder(reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("json")
    reference.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["spiece", "json_folder"])
@pytest.mark.parametrize("length", [4, 16, 64])
def test_same_ids_as_transformers(kind, length, reference, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    for text in TEXTS:
        expected = reference(text, padding="max_length", max_length=length, truncation=True)
        tokens = tokenizer.encode(text, length)
        assert tokens.ids == expected.input_ids, text
        assert tokens.mask == expected.attention_mask, text


def scrambled(special, seed, count=60):
    """Texts of special tokens, whole and broken, words, spaces and signs, side by side at random."""
    draw = random.Random(seed)
    parts = [
        *special,
        *(token[:-1] for token in special),
        "red",
        " circle",
        "moving",
        " ",
        "  ",
        "\n",
        "'s",
        "12",
        "!",
        "\u65e5",
        "\u00e9",
        ",",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["spiece", "json_folder"])
def test_special_tokens_anywhere_in_a_text_are_those_of_transformers(kind, reference, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    for text in scrambled(["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_12>", "<extra_id_1>"], 1):
        assert tokenizer.encode(text).ids == reference(text).input_ids, text
    assert tokenizer.token_id("<extra_id_3>") == reference.convert_tokens_to_ids("<extra_id_3>")
    ids = tokenizer.encode("a red <extra_id_3> circle").ids
    assert tokenizer.text(ids) == reference.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["spiece", "json_folder"])
def test_truncation_is_counted_and_keeps_the_end(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "red " * 20
    whole = tokenizer.encode(text, 100)
    length = sum(whole.mask)
    assert (
        whole.truncated == 0
        and whole.ids[length - 1] == tokenizer.eos
        and set(whole.ids[length:]) == {tokenizer.pad}
    )
    assert tokenizer.encode(text, length) == (whole.ids[:length], [1] * length, 0)
    cut = tokenizer.encode(text, length - 3)
    assert (
        cut.truncated == 3 and cut.ids == [*whole.ids[: length - 4], tokenizer.eos] and set(cut.mask) == {1}
    )


def test_json_is_preferred_and_its_own_padding_ignored(json_folder, spiece, tmp_path):
    engine = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    engine.enable_truncation(3)
    engine.enable_padding(length=40)
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"never read")
    assert load_tokenizer(tmp_path).encode("a red circle", 9) == load_tokenizer(spiece).encode(
        "a red circle", 9
    )


def test_unusable_files(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor spiece\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"spiece\.model' is not a usable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json' is not a usable tokenizer"):
        load_tokenizer(tmp_path)


# --- byte pairs: vocab.json and merges.txt

FRAMED = (
    "<|startoftext|> a <|endoftext|>\n<|im_start|>user\nIt's THEY'LL<|im_end|>\n"
    "<|image_pad|> <think>x</think>"
)
SAMPLES = (
    *TEXTS,
    FRAMED,
    "wow! ! !! Hello, WORLD 12345 3.14",
    "Größe ½ ﬁne e\u0301 \u00a0nbsp\u3000 İ",
    "🎨🖌️ 👩‍👩‍👧 \x07\u200b",
    "a\r\n\r\n  b\n ",
)


@pytest.fixture(scope="module", params=["CLIP-L", "CLIP-G", "Qwen"])
def pairs(request, tmp_path_factory):
    """(our tokenizer, transformers' of the same files)"""
    directory = tmp_path_factory.mktemp(request.param)
    make = {
        "CLIP-L": vocabularies.clip,
        "CLIP-G": lambda directory: vocabularies.clip(directory, "!"),
        "Qwen": vocabularies.qwen,
    }[request.param]
    kind = transformers.Qwen2Tokenizer if request.param == "Qwen" else transformers.CLIPTokenizer
    return load_tokenizer(make(directory)), kind.from_pretrained(directory)


def test_special_tokens_anywhere_among_byte_pairs_are_those_of_transformers(pairs):
    tokenizer, reference = pairs
    for text in scrambled([*reference.all_special_tokens, "<think>", "</think>"], 2):
        assert tokenizer.encode(text).ids == reference(text).input_ids, text


def test_special_tokens_of_older_files(tmp_path):
    """added_tokens.json and special_tokens_map.json in place of added_tokens_decoder."""
    tokenizer = load_tokenizer(vocabularies.qwen(tmp_path, old=True))
    reference = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in scrambled([*reference.all_special_tokens, "<think>", "</think>"], 3):
        assert tokenizer.encode(text).ids == reference(text).input_ids, text


def test_sentinels_of_a_t5_are_where_its_files_say(spiece, tmp_path):
    size = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model")).get_piece_size()
    (tmp_path / "spiece.model").write_bytes((spiece / "spiece.model").read_bytes())
    vocabularies.write(tmp_path, tokenizer_config={"extra_ids": 5})
    assert load_tokenizer(tmp_path).encode("a<extra_id_1>").ids[-2:] == [size + 3, 1]
    added = {str(size + 200): vocabularies.token("<extra_id_1>"), str(size): vocabularies.token("<mark>")}
    vocabularies.write(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    assert load_tokenizer(tmp_path).encode("a<extra_id_1><mark>").ids[-3:] == [size + 200, size, 1]
    vocabularies.write(tmp_path, tokenizer_config={"added_tokens_decoder": {"9": vocabularies.token("</s>")}})
    with pytest.raises(UserError, match="'</s>' should have id 9 and has 1"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [5, 77])
def test_byte_pairs_are_those_of_transformers(pairs, length, side):
    tokenizer, reference = pairs
    for text in SAMPLES:
        expected = reference(
            text, padding="max_length", max_length=length, truncation=True, padding_side=side
        )
        tokens = tokenizer.encode(text, length, side)
        assert (tokens.ids, tokens.mask) == (expected.input_ids, expected.attention_mask), text
        whole = reference(text).input_ids
        assert tokenizer.encode(text) == (whole, [1] * len(whole), 0)
        assert tokens.truncated == max(0, len(whole) - length)
        assert tokenizer.encode(text, length, "none").ids == whole[:length] or tokens.truncated
        assert tokenizer.text(whole) == reference.decode(whole, skip_special_tokens=True).strip()


def test_a_batch_is_padded_to_its_longest(pairs):
    tokenizer, reference = pairs
    texts = ["a red circle", "", "large blue ring moving left " * 9]
    for side in ("right", "left"):
        expected = reference(texts, padding=True, max_length=20, truncation=True, padding_side=side)
        rows = tokenizer.batch(texts, 20, side)
        assert [row.ids for row in rows] == expected.input_ids and [
            row.mask for row in rows
        ] == expected.attention_mask
        assert [row.truncated > 0 for row in rows] == [False, False, True]
    assert len(tokenizer.batch(texts[:2])[1].ids) == len(reference(texts[0]).input_ids)


def test_what_opens_closes_and_pads(tmp_path):
    clip = load_tokenizer(vocabularies.clip(tmp_path, "!"))
    ids = json.loads((tmp_path / "vocab.json").read_text())
    assert (clip.prefix, clip.suffix) == (
        (ids["<|startoftext|>"],),
        (ids["<|endoftext|>"],),
    ) and clip.pad == ids["!"] == 0
    assert (
        clip.eos == ids["<|endoftext|>"] == clip.token_id("<|endoftext|>")
        and clip.token_id("<|image_pad|>") is None
    )
    qwen = load_tokenizer(vocabularies.qwen(tmp_path))
    assert (qwen.prefix, qwen.suffix, qwen.pad, qwen.eos) == ((), (), 656, 658) and qwen.token_id(
        "<|image_pad|>"
    ) == 659


def test_the_old_layout_and_an_unsaid_class_give_the_same(tmp_path):
    for name in ("new", "old", "unsaid"):
        (tmp_path / name).mkdir()
    new, old = (
        load_tokenizer(vocabularies.qwen(tmp_path / "new")),
        load_tokenizer(vocabularies.qwen(tmp_path / "old", old=True)),
    )
    assert [new.encode(text, 40) for text in SAMPLES] == [old.encode(text, 40) for text in SAMPLES]
    clip = vocabularies.clip(tmp_path / "unsaid")
    said = load_tokenizer(clip)
    config = json.loads((clip / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    vocabularies.write(clip, tokenizer_config=config)
    assert [said.encode(text, 40) for text in SAMPLES] == [
        load_tokenizer(clip).encode(text, 40) for text in SAMPLES
    ]


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "$A", "<s> $A </s>"])
def test_tokenizer_json_adds_what_its_template_says(tmp_path, template):
    """FLUX.2 (padded on the left) and ERNIE: byte pairs in tokenizer.json, <s> before a text."""
    (tmp_path / "pairs").mkdir()
    pairs = vocabularies.qwen(tmp_path / "pairs")
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(pairs / "vocab.json"), str(pairs / "merges.txt"))
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<unk>", "<s>", "</s>", "[IMG]", "<pad>"])
    ends = [(name, engine.token_to_id(name)) for name in ("<s>", "</s>")]
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=ends
    )
    engine.save(str(tmp_path / "tokenizer.json"))
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "add_bos_token": True,
    }
    vocabularies.write(tmp_path, tokenizer_config=named | {"tokenizer_class": "TokenizersBackend"})
    tokenizer, reference = load_tokenizer(tmp_path), transformers.TokenizersBackend.from_pretrained(tmp_path)
    for text in (*SAMPLES, "[INST]look [IMG] here"):
        for length in (6, 60):
            expected = reference(text, padding="max_length", max_length=length, truncation=True)
            tokens = tokenizer.encode(text, length)
            assert (tokens.ids, tokens.mask) == (expected.input_ids, expected.attention_mask), text
    ids = tokenizer.encode("a red circle").ids
    assert (ids[0] == ends[0][1], ids[-1] == ends[1][1]) == ("<s>" in template, "</s>" in template)
    assert tokenizer.text(ids) == "a red circle" and tokenizer.text([*ids, tokenizer.eos]) == "a red circle"


def test_byte_pairs_that_do_not_fit_are_refused(tmp_path):
    config = json.loads((vocabularies.qwen(tmp_path) / "tokenizer_config.json").read_text())
    vocabularies.write(tmp_path, tokenizer_config=config | {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(
        UserError, match=r"CLIPTokenizer or Qwen2Tokenizer; tokenizer_class is 'GPT2Tokenizer'"
    ):
        load_tokenizer(tmp_path)
    vocabularies.write(
        tmp_path,
        tokenizer_config=config | {"added_tokens_decoder": {"700": vocabularies.token("<|endoftext|>")}},
    )
    with pytest.raises(UserError, match=r"'<\|endoftext\|>' should have id 700 and gets 656"):
        load_tokenizer(tmp_path)
    vocabularies.write(tmp_path, tokenizer_config=config | {"pad_token": None})
    with pytest.raises(UserError, match="no padding token"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("neither one")
    with pytest.raises(UserError, match=r"vocab\.json' is not a usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [*TEXTS, 'Text "hé日本". ', "<en-font-1>a<color-0>"])
def test_bytes_are_tokens_without_a_file(text, tmp_path):
    """ByT5's: three special tokens, the bytes, the sentinels, and whatever the small files add."""
    reference = transformers.ByT5Tokenizer()
    reference.add_tokens(["<color-0>", "<en-font-1>"], special_tokens=True)
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    encoded = tokenizer.encode(text, 40)
    expected = reference(text, padding="max_length", max_length=40, truncation=True)
    assert (encoded.ids, encoded.mask) == (expected.input_ids, expected.attention_mask)
    assert tokenizer.token_id("<color-0>") == reference.convert_tokens_to_ids("<color-0>") == 384
    plain = text.split("<")[0].strip()
    assert tokenizer.text(tokenizer.pieces(plain)) == plain
