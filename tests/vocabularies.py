"""Tokenizer files of byte pairs in the layouts that checkpoints have, with a few hundred pieces, for
transformers and tinydiff to read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tokenizers"

TURNS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")


def write(folder: Path, **files: Any) -> Path:
    """Each value as JSON in the file of its name."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def token(content: str, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """A token as tokenizer_config.json describes it."""
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def _bytes() -> list[str]:
    """The 256 characters that stand for bytes in byte pair files, in the order of their ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def clip(folder: Path, pad: str = "<|endoftext|>", **config: Any) -> Path:
    """The layout of CLIP's vocabulary with the first 400 merges of the released one; Video-G pads with "!",
    id 0.

    config: more entries of tokenizer_config.json.
    """
    merges = shutil.copy(DATA / "clip.merges.txt", folder / "merges.txt").read_text().splitlines()[1:]
    pieces = [*_bytes(), *(f"{byte}</w>" for byte in _bytes()), *(merge.replace(" ", "") for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    special = [(pieces.index(pad), pad, False)] if pad == "!" else []
    special += [(len(pieces) - 2, "<|startoftext|>", True), (len(pieces) - 1, "<|endoftext|>", False)]
    named = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    added = {str(index): token(content, normalized=normalized) for index, content, normalized in special}
    config = {"tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": added, **named, **config}
    return write(folder, vocab={piece: i for i, piece in enumerate(pieces)}, tokenizer_config=config)


def qwen(folder: Path, old: bool = False, **config: Any) -> Path:
    """The layout of Qwen's with the first 400 merges; `old`: the added tokens in added_tokens.json, as files
    before 2023 have them.

    config: more entries of tokenizer_config.json.
    """
    merges = shutil.copy(DATA / "qwen.merges.txt", folder / "merges.txt").read_text().splitlines()[1:]
    pieces = [*_bytes(), *(merge.replace(" ", "") for merge in merges)]
    tokens = {
        content: len(pieces) + i for i, content in enumerate(("<|endoftext|>", *TURNS, "<think>", "</think>"))
    }
    named = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(TURNS),
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "unk_token": None,
        **config,
    }
    write(folder, vocab={piece: i for i, piece in enumerate(pieces)})
    if old:
        named |= {"eos_token": token("<|im_end|>")}
        return write(folder, tokenizer_config=config, special_tokens_map=named, added_tokens=tokens)
    added = {str(index): token(content, special="think" not in content) for content, index in tokens.items()}
    return write(folder, tokenizer_config=config | named | {"added_tokens_decoder": added})


MISTRAL = {
    **{0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>"},
    **{17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"},
}


def mistral(folder: Path, framed: bool = True, **config: Any) -> Path:
    """The layout of Mistral's newer ones: a tokenizer.json of bytes and a few merges behind the special
    tokens.

    framed: whether BOS opens a text. config: more entries of tokenizer_config.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pairs = [
        ("i", "n"),
        ("e", "r"),
        ("Ġ", "a"),
        ("Ġ", "t"),
        ("Ġt", "h"),
        ("Ġth", "e"),
        ("o", "n"),
        ("a", "t"),
    ]
    pieces = [MISTRAL.get(i, f"<SPECIAL_{i}>") for i in range(20)] + _bytes() + [a + b for a, b in pairs]
    engine = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    engine.pre_tokenizer, engine.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    engine.add_special_tokens(pieces[:20])
    if framed:
        engine.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    engine.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **named, **config})


LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
    "<image>",
)


def llama(folder: Path, words: Iterable[str], **config: Any) -> Path:
    """The layout of Llama 3's: a tokenizer.json that opens a text, its byte pairs learned from `words`.

    config: more entries of tokenizer_config.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=list(LLAMA),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(words, trainer)
    first = LLAMA[0]
    engine.post_processor = processors.TemplateProcessing(
        f"{first} $A", f"{first} $A {first} $B", [(first, 0)]
    )
    engine.save(str(folder / "tokenizer.json"))
    named = {"bos_token": LLAMA[0], "eos_token": LLAMA[1], "pad_token": LLAMA[5], "padding_side": "right"}
    return write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **named, **config})
