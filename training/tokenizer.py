"""Builds the tokenizer of the shipped model: T5's kind, with a piece for each word of the captions and single
characters for other words.

The pieces and their scores are counted, not searched: each word of the captions is one piece that scores the
logarithm of its share, each printable ASCII character one that scores less than any word. So any English text
has pieces, and the same captions give the same file.

Capitals become small by a SentencePiece character map, because that is the one normalizer that
T5TokenizerFast takes over from a tokenizer.json.
"""

import json
import math
import re
import string
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from training.captions import caption, full_caption
from training.scenes import KEYS, scenes

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0, 1, 2 as in T5
SPACE = "\u2581"  # stands for the space before a word
CHARACTER_SCORE = -20.0
LONGEST = 512  # tokens of a prompt, as Wan's pipelines ask for


def corpus(seed: int = 0, count: int = 4000) -> Iterable[str]:
    """Captions of `count` scenes of each kind, in varied and in plain wording."""
    rng = Random(seed)
    for kind in KEYS:
        for scene in scenes(seed, kind, count):
            yield caption(scene, rng)
            yield full_caption(scene)


def pieces(texts: Iterable[str]) -> list[tuple[str, float]]:
    """The vocabulary: (piece, score) at its id.

    Special tokens, the bare space, characters, then words from the most common.
    """
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    total = sum(counts.values())
    characters = [c for c in string.printable if c.isprintable() and not c.isspace() and not c.isupper()]
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return [
        *((token, 0.0) for token in SPECIAL.values()),
        *((piece, CHARACTER_SCORE) for piece in (SPACE, *characters)),
        *((SPACE + word, math.log(counts[word] / total)) for word in words),
    ]


def build(vocabulary: list[tuple[str, float]]) -> Tokenizer:
    """The tokenizer over a vocabulary: small letters, words apart at spaces, `</s>` at the end."""
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.normalizer = normalizers.Precompiled(
        character_map(string.ascii_uppercase, string.ascii_lowercase)
    )
    metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save(folder: str | Path) -> Tokenizer:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, which T5TokenizerFast loads,
    and returns the tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build(pieces(corpus()))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **SPECIAL,
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": LONGEST,
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", SPECIAL)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    return tokenizer


def character_map(sources: str, targets: str) -> bytes:
    """A SentencePiece character map of ASCII characters: a Darts double array, then the targets, each ended
    by a zero byte.

    A walk through the array starts at unit 0, goes from a unit to (its index xor its offset) xor the next
    byte, and fails unless that unit is labelled with the byte. A unit with a leaf has it at (its index xor
    its offset). Here: the first bytes at 256 + byte, their leaves at 512 + byte.
    https://github.com/s-yata/darts-clone,
    https://github.com/google/sentencepiece/blob/master/src/normalizer.cc
    """
    units = [0] * 768
    units[0] = 256 << 10
    for place, source in enumerate(sources.encode("ascii")):
        units[256 + source] = (256 ^ 512) << 10 | 1 << 8 | source
        units[512 + source] = 1 << 31 | 2 * place
    trie = struct.pack("<768I", *units)
    return struct.pack("<I", len(trie)) + trie + "".join(target + "\0" for target in targets).encode()


if __name__ == "__main__":
    import sys

    save(sys.argv[1])
