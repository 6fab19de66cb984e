"""The fields of a request, OpenAI's and tinydiff's own, as what to make, what the answer retries, and the
images given.

Every field has an effect or is an error. What OpenAI has and a diffusion model has no use for is accepted at
the values that ask for nothing. Every sampling option of `tinydiff generate` is a field under its name there,
at top level or inside `extra_body`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields as fields_of
from typing import Any, NamedTuple, get_type_hints

from tinydiff import config, flags, unsupported, values
from tinydiff.config import OutputOptions, SamplingOptions
from tinydiff.records import UserError, nearest, shown
from tinydiff.serve.body import parse_json
from tinydiff.serve.errors import Refusal
from tinydiff.serve.jobs import Kind

MOST_PICTURES = 16
MOST_PICTURE_BYTES = 50 * 2**20
MOST_PROMPT = 32_000
"""Characters of a text."""
MOST_OUTPUTS = 10_000
"""Outputs that a server may allow one request (--max-outputs)."""
MOST_PARTIAL = 3
MOST_SECONDS = 3600
MOST_LISTED = 10_000
"""Values of a list."""

STEPS_OF_QUALITY = {"low": 0.5, "medium": 0.75, "high": 1.0, "hd": 1.0, "xhigh": 1.5, "max": 2.0}
"""What `quality` means here: so many times the model's own number of steps. "auto" and "standard" leave it.
"""


class FileId(NamedTuple):
    """An image that is among the server's files already."""

    id: str


class Asked(NamedTuple):
    """A request's fields, read."""

    fields: dict[str, Any]
    """Sampling options and those of encoding, by the names of `tinydiff generate`."""
    answer: dict[str, Any]
    """What else was said: `model`, `size`, `quality`, `seconds`, `output_format`, `response_format`,
    `stream`, `user`, ...; and `spelled`, the client's names of fields where they differ."""
    given: dict[str, tuple[str | bytes | FileId, ...]]
    """"image_path" or "mask_path" -> images: bytes, a data URI or an address, or a file of the server's."""


Reader = Callable[[str, Any, bool], Any]
"""(field, value, whether numbers may be texts, as in a form) -> the value, checked. Raises UserError."""


def _text(most: int = 512) -> Reader:
    def read(name: str, value: Any, words: bool) -> str:
        if not isinstance(value, str):
            raise _wrong(name, value, "a string")
        if len(value) > most:
            raise UserError(name, f"{name}: has {len(value):,} characters; {most:,} are the most")
        return value

    return read


def _whole(least: int, most: int) -> Reader:
    def read(name: str, value: Any, words: bool) -> int:
        value = (
            int(value) if words and isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value) else value
        )
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, value, "an integer")
        if not least <= value <= most:
            raise UserError(name, f"{name}: {_shown(value)} must be from {least} to {most}")
        return value

    return read


def _truth(name: str, value: Any, words: bool) -> bool:
    value = (
        {"true": True, "false": False}.get(value[:8].lower(), value)
        if words and isinstance(value, str)
        else value
    )
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _choice(*choices: str, **same: str) -> Reader:
    def read(name: str, value: Any, words: bool) -> str:
        text = same.get(value, value) if isinstance(value, str) else value
        if text not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise UserError(name, f"{name}: {_shown(value)} is not one of {', '.join(choices)}{hint}")
        return text

    return read


def _size(name: str, value: Any, words: bool) -> str:
    if not isinstance(value, str) or not (
        value == "auto" or re.fullmatch("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", value)
    ):
        raise UserError(
            name, f'{name}: {_shown(value)} is neither "auto" nor WIDTHxHEIGHT in pixels, such as "1024x768"'
        )
    return value


def _seconds(name: str, value: Any, words: bool) -> float:
    """OpenAI has them as a text, "4"; a number is taken too."""
    if isinstance(value, str) and not _NUMBERS.fullmatch(value):
        raise _wrong(name, value, 'a number of seconds, such as "4"')
    return values.within_limits(name, float, value, {"above": 0, "most": MOST_SECONDS})


BOTH: dict[str, Reader] = {
    "model": _text(),
    "size": _size,
    "quality": _choice("auto", "standard", *STEPS_OF_QUALITY),
    "n": _whole(1, MOST_OUTPUTS),
    "user": _text(),
    "safety_identifier": _text(),
    "priority": _whole(-10, 10),
}
"""Fields of images and of videos that are no options of `generate`."""

OWN: dict[Kind, dict[str, Reader]] = {
    "image": {
        **BOTH,
        "background": _choice("auto", "opaque", "transparent"),
        "output_format": _choice("png", "webp", "jpeg", jpg="jpeg"),
        "response_format": _choice("b64_json", "url"),
        "stream": _truth,
        "partial_images": _whole(0, MOST_PARTIAL),
        "progress": _truth,
    },
    "video": {**BOTH, "seconds": _seconds, "output_format": _choice("mp4", "webm", "gif")},
}

PICTURES: dict[Kind, dict[str, str]] = {
    "image": {"image": "image_path", "images": "image_path", "url": "image_path", "mask": "mask_path"},
    "video": {
        "input_reference": "image_path",
        "image": "image_path",
        "images": "image_path",
        "reference_url": "image_path",
    },
}
"""Fields that give images -> what `generate` calls them; its own names are taken too."""

IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "moderation": (("auto", "low"), "nothing is moderated here"),
    "input_fidelity": (
        ("low",),
        "no model here has such a setting; for one that starts from the image it is strength",
    ),
    "style": ((), "a style is said in the prompt"),
    "complexity": ((), "a diffusion model has no such setting; it is num_inference_steps"),
    "frame_count": ((1,), "an animation is a video, asked for at /v1/videos"),
    "frame_duration_ms": ((), "an animation is a video, asked for at /v1/videos with fps"),
    "svg": ((), "images are made of pixels"),
    "markup": ((), "no model here reads marks on an image; a mask says where it is inpainted"),
    "enhance_prompt": ((False, "false"), unsupported.said("prompt rewriting by another model")),
}
"""What OpenAI or SGLang have and nothing here does: the values that ask for nothing, and why there are no
others.
"""

ENCODING = ("output_quality", "output_compression", "x264_preset")
SAMPLING = tuple(
    entry.name for entry in fields_of(SamplingOptions) if entry.name not in ("image_path", "mask_path")
)
_HINTS = {**get_type_hints(SamplingOptions), **get_type_hints(OutputOptions)}
_LIMITS = {entry.name: entry.metadata for entry in (*fields_of(SamplingOptions), *fields_of(OutputOptions))}
_ELSEWHERE = {*config.NAMES, *flags.SERVER, *flags.MAPS, "prompt_path", "output_file_path", "no_save_output"}
"""Names of `generate` and `serve` that a request cannot settle, but for the above."""
_NUMBERS = re.compile("-?[.0-9][-+.0-9eE]*(?:[, ]+-?[.0-9][-+.0-9eE]*)*")
"""What numbers in a form begin with and hold. `values` reads more, as words of a command line: blanks, a
plus, infinity.
"""
_EXTRA = ("extra_body", "extra_params", "extra_json")


def read_fields(body: Mapping[str, Any], kind: Kind, form: bool = False) -> Asked:
    """The fields of a body. form: whether it was a form, whose numbers are texts. null means "not given".

    Without a seed there is a random one. Raises UserError and, for a name that is unknown or missing,
    Refusal.
    """
    fields: dict[str, Any] = {}
    answer: dict[str, Any] = {}
    given: dict[str, tuple[str | bytes | FileId, ...]] = {}
    spelled: dict[str, str] = {}

    def claim(name: str, meant: str) -> None:
        if spelled.setdefault(meant, name) != name:
            raise UserError(name, f"{name}: give either {spelled[meant]} or {name}, not both")

    for name, value, words in _entries(body, form):
        meant = flags.ALIASES.get(name, name)
        if value is None and _known(name, kind):
            continue
        if name in OWN[kind]:
            answer[name] = OWN[kind][name](name, value, words)
        elif (what := PICTURES[kind].get(name, meant)) in ("image_path", "mask_path"):
            claim(name, what)
            given[what] = tuple(_sources(name, value))
        elif name in flags.SIZES:
            if _truth(name, value, words):
                claim(name, "height")
                claim(name, "width")
                fields["height"], fields["width"] = flags.SIZES[name]
        elif meant in SAMPLING + ENCODING:
            claim(name, meant)
            fields[meant] = _option(name, meant, value, words)
        else:
            _refuse(name, value, kind)

    if answer.get("size", "auto") != "auto":
        for name, number in zip(("width", "height"), answer["size"].split("x"), strict=True):
            claim("size", name)
            fields[name] = int(number)
    if "n" in answer:
        claim("n", "num_outputs_per_prompt")
        fields["num_outputs_per_prompt"] = answer["n"]
    if "seconds" in answer:
        claim("seconds", "num_frames")
    if answer.get("quality") in STEPS_OF_QUALITY:
        claim("quality", "num_inference_steps")
    fields.setdefault("seed", [secrets.randbelow(2**32)])
    answer["spelled"] = {meant: name for meant, name in spelled.items() if meant != name}
    _agree(answer, given)
    return Asked(fields, answer, given)


def names(kind: Kind) -> list[str]:
    """Every field that a request of this kind may have."""
    pictures = [*PICTURES[kind], "image_path", *(("mask_path",) if kind == "image" else ())]
    return [*OWN[kind], *SAMPLING, *ENCODING, *pictures, *IDLE, *_EXTRA]


def _known(name: str, kind: Kind) -> bool:
    return name in names(kind) or name in flags.ALIASES or name in flags.SIZES or name in unsupported.OPTIONS


def _entries(body: Mapping[str, Any], form: bool) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, whether it is a form's) of the body and of what extra_body holds, each name once."""
    seen: set[str] = set()
    for name, value in body.items():
        inner = [(name, value, form)]
        if name in _EXTRA:
            words = form and not isinstance(value, str)
            value = parse_json(value, name) if isinstance(value, str) else value
            if not isinstance(value, dict | None):
                raise _wrong(name, value, "an object of names and values, or the JSON text of one")
            inner = [(key, each, words) for key, each in (value or {}).items()]
        for key, each, words in inner:
            if key in seen:
                raise UserError(key, f"{key}: is given twice, at top level and inside {name}")
            seen.add(key)
            yield key, each, words


def _option(name: str, meant: str, value: Any, words: bool) -> Any:
    """A sampling or encoding option. In JSON a number must be a number and a string a string; of strings
    there is one.
    """
    if isinstance(value, str) and len(value) > MOST_PROMPT:
        raise UserError(name, f"{name}: has {len(value):,} characters; {MOST_PROMPT:,} are the most")
    if meant in ("prompt", "negative_prompt"):
        return _text(MOST_PROMPT)(name, value, words)
    if meant == "loras":
        is_json = isinstance(value, str) and words and value
        return dict(_loras(name, parse_json(value, name) if is_json else value, words))
    hint = str(_HINTS[meant])
    if "bool" in hint:
        return _truth(name, value, words)
    several, numbers = hint.startswith("tuple"), "int" in hint or "float" in hint
    if words and several and isinstance(value, str) and value.startswith("["):
        value, words = parse_json(value, name), False
    each = value if isinstance(value, list) and several else [value]
    if len(each) > MOST_LISTED:
        raise UserError(name, f"{name}: has {len(each):,} values; {MOST_LISTED:,} are the most")
    for one in each:
        if isinstance(one, dict | list | bytes | bool | None) or isinstance(one, str) == (
            numbers and not words
        ):
            what = ("a number" if "float" in hint else "an integer") if numbers else "a string"
            raise _wrong(name, one, f"{what}{' or a list of them' if several else ''}")
    if words and numbers and not all(_NUMBERS.fullmatch(one) for one in each if isinstance(one, str)):
        raise _wrong(name, value, "a number" if "float" in hint else "an integer")
    return values.within_limits(name, _HINTS[meant], value, _LIMITS[meant])


def _loras(name: str, value: Any, words: bool) -> Iterator[tuple[str, float]]:
    """(adapter, strength) of {"style": 0.8}, of ["style"] and of [{"name": "style", "scale": 0.8}]."""
    pairs = list(value.items()) if isinstance(value, dict) else value or []
    if not isinstance(pairs, list) or len(pairs) > MOST_LISTED:
        raise _wrong(name, value, f"an object of adapters and strengths, or a list of at most {MOST_LISTED}")
    seen: set[str] = set()
    for item in pairs:
        match item:
            case str() as adapter:
                strength: Any = 1.0
            case (str() as adapter, strength):
                pass
            case {"name": str() as adapter, **rest} if rest.keys() <= {"scale"}:
                strength = rest.get("scale", 1.0)
            case _:
                raise _wrong(name, item, 'an adapter, such as {"name": "style", "scale": 0.8}')
        if words and isinstance(strength, str) and _NUMBERS.fullmatch(strength):
            strength = values.within_limits(f"{name}.{adapter}"[:80], float, strength, {})
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) <= 100:
            raise _wrong(f"{name}.{adapter}"[:80], strength, "a number from -100 to 100")
        if adapter in seen:
            raise UserError(name, f"{name}: {adapter[:80]!r} is given twice")
        seen.add(adapter)
        yield adapter, float(strength)


def _sources(name: str, value: Any) -> Iterator[str | bytes | FileId]:
    """Images as a field gives them: one or several of bytes, a text, {"image_url": ...} and {"file_id":
    ...}.
    """
    items = value if isinstance(value, list) else [value]
    if len(items) > (1 if name.startswith("mask") else MOST_PICTURES):
        most = "one mask" if name.startswith("mask") else f"{MOST_PICTURES} images at most"
        raise UserError(name, f"{name}: {len(items)} are given; there may be {most}")
    for item in items:
        if isinstance(item, dict):
            item = {key: inner for key, inner in item.items() if inner is not None}
            [(key, inner)] = item.items() if len(item) == 1 else [("", None)]
            if key not in ("image_url", "file_id") or not isinstance(inner, str):
                raise UserError(
                    name,
                    f'{name}: an object gives an image as {{"image_url": "..."}} or {{"file_id": "..."}}',
                )
            item = FileId(inner) if key == "file_id" else inner
        if not isinstance(item, str | bytes | FileId):
            raise _wrong(
                name,
                item,
                "an image: a file, a data URI, an address, or an object with image_url or file_id",
            )
        if isinstance(item, bytes) and len(item) > MOST_PICTURE_BYTES:
            raise UserError(
                name,
                f"{name}: an image has {len(item) / 2**20:.0f} MiB; {MOST_PICTURE_BYTES // 2**20} are the most",
            )
        yield item


def _refuse(name: str, value: Any, kind: Kind) -> None:
    """Raise for a field that has no effect, unless the value asks for nothing."""
    if name in IDLE:
        free, why = IDLE[name]
        if any(type(value) is type(each) and value == each for each in free):
            return
        only = f"; it may be {' or '.join(map(_shown, free))}" if free else ""
        raise UserError(name, f"{name}: {_shown(value)} cannot be had: {why}{only}")
    if name in unsupported.OPTIONS:
        if sentence := flags.refusal(name, value):
            raise UserError(name, sentence)
        return
    if name in _ELSEWHERE or flags.ALIASES.get(name) in _ELSEWHERE:
        raise UserError(name, f"{name}: is settled where the server is started, not by a request")
    other: Kind = "video" if kind == "image" else "image"
    if name in OWN[other] or name in PICTURES[other]:
        where = "/v1/videos" if other == "video" else "/v1/images/generations"
        raise Refusal(400, "unknown_parameter", f"{name}: is a field of {where}, not of this address", name)
    raise Refusal(
        400, "unknown_parameter", f"{name[:80]}: no such field{nearest(name, names(kind))}", name[:80]
    )


def _agree(answer: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """What no single field can tell."""
    streams = answer.get("stream", False)
    for name in ("partial_images", "progress"):
        if answer.get(name) and not streams:
            raise UserError(name, f"{name}: {_shown(answer[name])} needs stream, which sends them on the way")
    if streams and answer.get("response_format") == "url":
        raise UserError(
            "response_format", "response_format: a stream carries the images themselves, b64_json"
        )
    if "mask_path" in given and "image_path" not in given:
        raise UserError("mask", "mask: says where a given image is inpainted; give the image as image")


def _wrong(name: str, value: Any, wanted: str) -> UserError:
    return UserError(name, f"{name}: {_shown(value)} is not {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return "a file"
    return (
        {True: "true", False: "false", None: "null"}[value]
        if isinstance(value, bool | None)
        else shown(value)
    )
