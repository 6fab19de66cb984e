"""Text to token ids, whichever tokenizer files a checkpoint has.

Three formats are read: `tokenizer.json`; `vocab.json` with `merges.txt` (byte pairs of CLIP and Qwen);
`spiece.model` (T5). ByT5's tokens are bytes and need no file. The small JSON files beside them name the
special tokens and the side of padding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tinydiff.entries import Entries, EntryDict, value
from tinydiff.io import chat
from tinydiff.io.hub import read_json
from tinydiff.records import UserError


class Tokens(NamedTuple):
    """One encoded text. mask: 1 for tokens, 0 for padding. truncated: how many tokens were cut."""

    ids: list[int]
    mask: list[int]
    truncated: int


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as plain functions and ids.

    pieces: ids of a text, whose written special tokens count as such; none are added. text: the text of ids,
    without special tokens. token_id: the id of a token, None if there is none. prefix, suffix: ids around a
    sequence. pad, eos: ids; eos is None if the files name none. side: where padding goes, "right" or "left".
    """

    pieces: Callable[[str], list[int]]
    text: Callable[[Sequence[int]], str]
    token_id: Callable[[str], int | None]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    eos: int | None
    side: str = "right"
    longest: int | None = None
    """`model_max_length` of the files, None for no limit."""
    chat: Callable[[chat.Turns], str] | None = None
    """From the turns of a chat to their text; None if the files have no template."""

    def encode(
        self, text: str, max_length: int | None = None, side: str | None = None, framed: bool = True
    ) -> Tokens:
        """Ids of `text` between prefix and suffix, cut to `max_length` before the suffix.

        side: "left" or "right" pads to `max_length`, "none" does not pad; by default the side of the files.
        framed: whether prefix and suffix are added; a chat template has its own.
        """
        ids, (prefix, suffix) = self.pieces(text), (self.prefix, self.suffix) if framed else ((), ())
        room = len(ids) if max_length is None else max(0, max_length - len(prefix) - len(suffix))
        kept = [*prefix, *ids[:room], *suffix]
        whole = Tokens(kept, [1] * len(kept), max(0, len(ids) - room))
        return whole if max_length is None or side == "none" else self.padded(whole, max_length, side)

    def batch(
        self, texts: Sequence[str], max_length: int | None = None, side: str | None = None
    ) -> list[Tokens]:
        """Each text as by `encode`, padded to the longest of them."""
        encoded = [self.encode(text, max_length, "none") for text in texts]
        longest = max(len(each.ids) for each in encoded)
        return [self.padded(each, longest, side) for each in encoded]

    def padded(self, tokens: Tokens, length: int, side: str | None = None) -> Tokens:
        """`tokens` padded to `length`."""
        ids, mask, truncated = tokens
        extra = length - len(ids)
        if (side or self.side) == "left":
            return Tokens([self.pad] * extra + ids, [0] * extra + mask, truncated)
        return Tokens(ids + [self.pad] * extra, mask + [0] * extra, truncated)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's `tokenizer` directory, which gives the ids of transformers' tokenizers.

    `tokenizer.json` is preferred to the other files. Raises UserError if files are missing or cannot be read.
    """
    for names, read in _READERS.items():
        if all((directory / name).is_file() for name in names):
            return _read(directory, _checked_settings(directory), read, names[0])
    if (settings := _checked_settings(directory)).kind == "ByT5Tokenizer":
        return _read(directory, settings, _from_bytes, "tokenizer_config.json")
    missing = "has no vocab.json with merges.txt and has neither tokenizer.json nor spiece.model"
    raise UserError("model_path", f"model_path: {str(directory)!r} {missing}")


Read = Callable[[Path, "Settings"], Tokenizer]


def _read(directory: Path, settings: Settings, read: Read, name: str) -> Tokenizer:
    try:
        tokenizer = read(directory, settings)
        return replace(tokenizer, longest=_longest(directory), chat=chat.template(directory))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        message = f"{str(directory / name)!r} is not a usable tokenizer ({error})"
        raise UserError("model_path", f"model_path: {message}") from error


# --- the small JSON files


class Settings(NamedTuple):
    """What the small JSON files say.

    kind: tokenizer_class without "Fast", "" if missing. named: "pad_token" and the like -> the token. added:
    tokens beyond the vocabulary, by id. side: where padding goes. extra_ids: number of T5's sentinel tokens.
    """

    kind: str
    named: dict[str, str]
    added: dict[int, EntryDict]
    side: str
    extra_ids: int


def _checked_settings(directory: Path) -> Settings:
    try:
        return _settings(directory)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "model_path", f"model_path: the small files of {str(directory)!r}: {error}"
        ) from error


def _settings(directory: Path) -> Settings:
    config, special, old = (
        read_json(path) if (path := directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    entries = special | {name: value for name, value in config.items() if value is not None}
    named = {
        name: _content(name, entries[name])
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if entries.get(name)
    }
    listed = _of_type(entries, "additional_special_tokens", list)
    more = [_content("additional_special_tokens", token) for token in listed]
    added = {
        _index("added_tokens_decoder", index): {
            **(token if isinstance(token, Mapping) else {}),
            "content": _content("added_tokens_decoder", token),
        }
        for index, token in _of_type(config, "added_tokens_decoder", dict).items()
    }
    for token, index in old.items():
        flags = {"content": token, "special": token in more or token in named.values()}
        added.setdefault(_index("added_tokens.json", index), flags)
    side = _of_type(config, "padding_side", str) or "right"
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; it must be 'left' or 'right'")
    kind = _of_type(config, "tokenizer_class", str).removesuffix("Fast")
    extra_ids = value("extra_ids", int, config.get("extra_ids", 100))
    return Settings(kind, named, dict(sorted(added.items())), side, extra_ids)


T = TypeVar("T")
WORDS = {str: "a string", list: "a list", dict: "an object"}


def _of_type(entries: Entries, name: str, kind: type[T]) -> T:
    """An entry, empty where it is left out or null. Raises ValueError for one of another type."""
    given = entries.get(name)
    if given is not None and not isinstance(given, kind):
        raise ValueError(f"{name} is {given!r}; it must be {WORDS[kind]}")
    return kind() if given is None else given


def _content(name: str, token: Any) -> str:
    """The text of a token, given alone or in an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ValueError(f"{name} has {token!r}; a token is a string, or an object with content")
    return text


def _index(name: str, index: Any) -> int:
    try:
        return int(index)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} has {index!r}; a token's id is an integer") from None


NO_LIMIT = 10**9
"""transformers writes a much larger number for no limit."""


def _longest(directory: Path) -> int | None:
    path = directory / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.is_file() else None
    return int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None


# --- the tokenizers library

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How transformers' Qwen2Tokenizer and CLIPTokenizer split a text into words before merging byte pairs."""


def _from_json(directory: Path, settings: Settings) -> Tokenizer:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_file(str(directory / "tokenizer.json"))
    engine.no_truncation()
    engine.no_padding()
    return _engine(engine, settings)


def _from_merges(directory: Path, settings: Settings) -> Tokenizer:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    kind = settings.kind or (
        "CLIPTokenizer" if any(piece.endswith("</w>") for piece in vocabulary) else "Qwen2Tokenizer"
    )
    if kind not in ("CLIPTokenizer", "Qwen2Tokenizer"):
        readable = "vocab.json is read as CLIPTokenizer or Qwen2Tokenizer"
        raise ValueError(f"{readable}; tokenizer_class is {kind!r}")
    clip = kind == "CLIPTokenizer"
    end, unknown = ("</w>", settings.named.get("unk_token", "<|endoftext|>")) if clip else ("", None)
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    engine = Engine(
        models.BPE.from_file(*files, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix=end)
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=clip)
    if clip:
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True), bytes_]
        )
        engine.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
        return _engine(engine, settings, framed=True)
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), bytes_]
    )
    engine.decoder = decoders.ByteLevel()
    return _engine(engine, settings, framed=False)


FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
"""Options of an added token."""


def _engine(engine: Any, settings: Settings, framed: bool | None = None) -> Tokenizer:
    """The engine, with the tokens that only the small files name.

    framed: whether BOS and EOS are put around a text; by default as tokenizer.json says, for T5 EOS alone.
    """
    from tokenizers import AddedToken

    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for index, token in settings.added.items():
        content = token["content"]
        if content in known:
            continue
        engine.add_tokens([AddedToken(content, **{name: token[name] for name in FLAGS if name in token})])
        if (got := engine.token_to_id(content)) != index:
            raise ValueError(f"token {content!r} should have id {index} and gets {got}")
        known.add(content)
    engine.add_special_tokens([token for token in settings.named.values() if token not in known])

    def ids_of(name: str, usual: str) -> int | None:
        return engine.token_to_id(settings.named.get(name, usual))

    bos, eos = ids_of("bos_token", "<s>"), ids_of("eos_token", "</s>")
    pad = ids_of("pad_token", "<pad>")
    if pad is None:
        raise ValueError("it has no padding token")
    begin, end = (() if token is None else (token,) for token in (bos, eos))
    if framed is None:
        prefix, suffix = ((), end) if settings.kind == "T5Tokenizer" else _frame(engine)
    else:
        prefix, suffix = (begin, end) if framed else ((), ())
    return Tokenizer(
        lambda text: engine.encode(text, add_special_tokens=False).ids,
        lambda ids: engine.decode(list(ids), skip_special_tokens=True).strip(),
        engine.token_to_id,
        prefix,
        suffix,
        pad,
        eos,
        settings.side,
    )


def _frame(engine: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the engine's own template puts before and after a text."""
    bare, framed = (engine.encode("a", add_special_tokens=add).ids for add in (False, True))
    extra = len(framed) - len(bare)
    start = next((i for i in range(extra + 1) if framed[i : i + len(bare)] == bare), 0)
    return tuple(framed[:start]), tuple(framed[start + len(bare) :])


# --- the sentencepiece library


def _from_spiece(directory: Path, settings: Settings) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor(model_file=str(directory / "spiece.model"))
    eos, pad = engine.eos_id(), engine.pad_id()
    if eos < 0 or pad < 0:
        raise ValueError("it has no end or no padding token")
    size, count = engine.get_piece_size(), settings.extra_ids
    special = {engine.id_to_piece(i): i for i in range(size) if engine.is_control(i) or engine.is_unknown(i)}
    if not any(token["content"].startswith("<extra_id_") for token in settings.added.values()):
        special |= {f"<extra_id_{i}>": size + count - 1 - i for i in range(count)}
    for index, token in settings.added.items():
        if special.setdefault(token["content"], index) != index:
            got = special[token["content"]]
            raise ValueError(f"token {token['content']!r} should have id {index} and has {got}")

    def text(ids: Sequence[int]) -> str:
        return engine.decode([i for i in ids if i < size and i not in special.values()]).strip()

    def token_id(token: str) -> int | None:
        if token in special:
            return special[token]
        index = engine.piece_to_id(token)
        return index if engine.id_to_piece(index) == token else None

    pieces = _with_special(special, engine.encode)
    return Tokenizer(pieces, text, token_id, (), (eos,), pad, eos, settings.side)


def _with_special(
    special: Mapping[str, int], encode: Callable[[str], list[int]], loose: Collection[str] = ()
) -> Callable[[str], list[int]]:
    """`encode` for texts in which a written special token is that token, as in tokenizer.json.

    loose: tokens that take the white space around them too.
    """
    words = (
        rf"\s*{re.escape(token)}\s*" if token in loose else re.escape(token)
        for token in sorted(special, key=len, reverse=True)
    )
    split = re.compile(f"({'|'.join(words)})")

    def pieces(text: str) -> list[int]:
        found = ((part, special.get(part, special.get(part.strip()))) for part in split.split(text))
        return [i for part, index in found for i in (encode(part) if index is None else [index])]

    return pieces


# --- no library

BYTES = {"<pad>": 0, "</s>": 1, "<unk>": 2}
"""ByT5's first tokens; the bytes follow them."""


def _from_bytes(directory: Path, settings: Settings) -> Tokenizer:
    added = {token["content"]: index for index, token in settings.added.items()}
    special, first = BYTES | added, len(BYTES)

    def text(ids: Sequence[int]) -> str:
        return bytes(i - first for i in ids if first <= i < first + 256).decode(errors="ignore")

    tight = {token["content"] for token in settings.added.values() if not token.get("lstrip")}
    pieces = _with_special(
        special, lambda text: [first + byte for byte in text.encode()], BYTES.keys() - tight
    )
    eos = special["</s>"]
    return Tokenizer(pieces, text, special.get, (), (eos,), special["<pad>"], eos, settings.side)


_READERS: dict[tuple[str, ...], Read] = {
    ("tokenizer.json",): _from_json,
    ("vocab.json", "merges.txt"): _from_merges,
    ("spiece.model",): _from_spiece,
}
"""Files of a tokenizer -> the function that reads them; the first whose files exist is used."""
