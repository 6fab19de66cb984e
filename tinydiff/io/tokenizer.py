"""Text to token ids as T5 and UMT5 take them, whichever tokenizer file the checkpoint has, and the prompt cleaning of Wan."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tinydiff.records import UserError


class Tokens(NamedTuple):
    """One encoded text. ids and mask have the asked length; mask is 1 on tokens, 0 on padding; `truncated` tokens of text were cut."""

    ids: list[int]
    mask: list[int]
    truncated: int


@dataclass(frozen=True)
class Tokenizer:
    """ids of a text without its end, and the two ids that close and pad a sequence."""

    pieces: Callable[[str], list[int]]
    eos: int
    pad: int

    def encode(self, text: str, max_length: int) -> Tokens:
        """Ids of `text` closed by EOS and padded on the right to `max_length`; a longer text is cut so that EOS stays last."""
        ids = self.pieces(text)
        kept = [*ids[: max_length - 1], self.eos]
        padding = max_length - len(kept)
        return Tokens(kept + [self.pad] * padding, [1] * len(kept) + [0] * padding, max(0, len(ids) - (max_length - 1)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's `tokenizer` folder: `tokenizer.json` if it has one, else `spiece.model`.

    Both give the ids of transformers' T5TokenizerFast. Raises UserError if neither file is there or it cannot be read.
    """
    for name, read in (("tokenizer.json", _from_json), ("spiece.model", _from_spiece)):
        path = folder / name
        if path.is_file():
            try:
                return read(path)
            except Exception as error:  # the tokenizers library raises bare Exception
                raise UserError("model_path", f"model_path: {str(path)!r} is not a usable tokenizer ({error})") from error
    raise UserError("model_path", f"model_path: {str(folder)!r} has neither tokenizer.json nor spiece.model")


def prompt_clean(text: str) -> str:
    """Repair broken Unicode, undo HTML entities (twice, for what was escaped twice) and collapse white space.

    The reference is `prompt_clean` of diffusers' Wan pipelines.
    """
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_file(str(path))
    engine.no_truncation()
    engine.no_padding()
    eos, pad = engine.token_to_id("</s>"), engine.token_to_id("<pad>")
    if eos is None or pad is None:
        raise ValueError("it has no </s> or no <pad> token")
    return Tokenizer(lambda text: engine.encode(text, add_special_tokens=False).ids, eos, pad)


def _from_spiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor(model_file=str(path))
    eos, pad = engine.eos_id(), engine.pad_id()
    if eos < 0 or pad < 0:
        raise ValueError("it has no end or no padding token")
    special = {engine.id_to_piece(i): i for i in range(engine.get_piece_size()) if engine.is_control(i) or engine.is_unknown(i)}
    split = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def pieces(text: str) -> list[int]:
        """A special token written out in a text is that token, as in tokenizer.json."""
        parts = split.split(text)
        return [i for part in parts for i in ([special[part]] if part in special else engine.encode(part))]

    return Tokenizer(pieces, eos, pad)
