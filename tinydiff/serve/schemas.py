"""JSON schemas of bodies and answers. Those of options come from the records that check them: their types,
ranges and docstrings.
"""

from __future__ import annotations

import re
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinydiff.config import OutputOptions, SamplingOptions
from tinydiff.serve import fields
from tinydiff.serve.jobs import Kind
from tinydiff.values import descriptions

Schema = dict[str, Any]

TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
BOUNDS = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum"}
"""Words of `values.within` -> JSON schema's."""
LARGEST = 2**53 - 1
"""JSON numbers are exact up to here in every language; greater bounds are not worth telling."""

SIZE = "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"

OPTIONS: dict[str, type] = {
    **{name: SamplingOptions for name in fields.SAMPLING},
    **{name: OutputOptions for name in fields.ENCODING},
}
"""Field -> the record that has it."""


def obj(
    properties: Schema,
    required: tuple[str, ...] | None = None,
    closed: bool = False,
    optional: Schema | None = None,
    **more: Any,
) -> Schema:
    """An object. required: all of `properties` unless told. optional: further properties that may be missing."""
    needed = list(properties if required is None else required)
    found = {"type": "object", "properties": {**properties, **(optional or {})}, "required": needed, **more}
    return {**found, "additionalProperties": False} if closed else found


def text(says: str, **more: Any) -> Schema:
    return {"type": "string", "description": says, **more}


def whole(says: str, least: int | None = None, most: int | None = None, **more: Any) -> Schema:
    limits = {"minimum": least, "maximum": most}
    return {
        "type": "integer",
        "description": says,
        **{name: limit for name, limit in limits.items() if limit is not None},
        **more,
    }


def choice(says: str, *values: Any, **more: Any) -> Schema:
    return {"enum": list(values), "description": says, **more}


def listed(items: Schema, says: str = "", **more: Any) -> Schema:
    return {"type": "array", "items": items, "description": says, **more}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return (
        {**schema, "type": [schema["type"], "null"]}
        if "type" in schema
        else {"anyOf": [schema, {"type": "null"}]}
    )


LORAS = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        listed(
            {
                "anyOf": [
                    {"type": "string"},
                    obj(
                        {"name": {"type": "string"}},
                        closed=True,
                        optional={"scale": {"type": "number", "minimum": -100, "maximum": 100}},
                    ),
                ]
            },
            "Adapters by name, or each with its strength.",
        ),
    ]
}
"""Adapters and their strengths."""


@cache
def docstrings(record: type) -> dict[str, str]:
    """Field -> its description, without the sentences about the command line."""
    return {
        name: " ".join(each for each in re.split(r"(?<=\.) ", text) if "--" not in each)
        for name, text in descriptions(record).items()
    }


def option(name: str) -> Schema:
    """The schema of a sampling or encoding option; several values may be one, or a list of them."""
    record = OPTIONS[name]
    if name == "loras":
        return LORAS | {"description": docstrings(record)[name]}
    kind, limits = get_type_hints(record)[name], record.__dataclass_fields__[name].metadata
    kind = (
        next((one for one in get_args(kind) if one is not NoneType), kind)
        if NoneType in get_args(kind)
        else kind
    )
    several = get_origin(kind) is tuple
    inner = get_args(kind)[0] if several else kind
    one: Schema = {"enum": list(get_args(inner))} if get_origin(inner) is Literal else {"type": TYPES[inner]}
    one |= {
        word: limits[key] for key, word in BOUNDS.items() if abs(limits.get(key, float("inf"))) <= LARGEST
    }
    says = {"description": docstrings(record)[name]}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}], **says} if several else one | says


def own(name: str, model: str) -> Schema:
    """The schema of a field that is no option of `generate`."""
    steps = ", ".join(f"{name} {factor:g}" for name, factor in fields.STEPS_OF_QUALITY.items())
    return {
        "model": choice("The model; left out, the one that is served.", model),
        "size": text("WIDTHxHEIGHT in pixels, or auto; the same as width and height.", pattern=SIZE),
        "quality": choice(
            f"So many times the model's own number of steps: {steps}.",
            "auto",
            "standard",
            *fields.STEPS_OF_QUALITY,
        ),
        "n": whole(
            "Outputs to make, of seeds from seed on; the same as num_outputs_per_prompt. /v1/models says how many at most.",
            1,
            fields.MOST_OUTPUTS,
        ),
        "user": text("Who asks; repeated in the answer.", maxLength=512),
        "safety_identifier": text("The same, by its newer name.", maxLength=512),
        "priority": whole("Higher goes first; above 0 needs the admin key.", -10, 10),
        "background": choice(
            "Transparent where the model makes layers, opaque elsewhere.", "auto", "opaque", "transparent"
        ),
        "output_format": {"description": "Form of the file.", "type": "string"},
        "response_format": choice(
            "The image itself, or an address that serves it for a while.", "b64_json", "url"
        ),
        "stream": {"type": "boolean", "description": "Answer with server-sent events."},
        "partial_images": whole("Previews on the way, of a stream.", 0, fields.MOST_PARTIAL),
        "progress": {
            "type": "boolean",
            "description": "In a stream, also send progress events: step, total, queue_position, eta_s.",
        },
        "seconds": {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
                {"type": "string", "pattern": "^[1-9][0-9]{0,2}$"},
            ],
            "description": "Length of the video; with fps the same as num_frames.",
        },
    }[name]


def request(
    kind: Kind, model: str, form: bool, required: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Schema:
    """A request's body. form: as multipart, where images are files and nothing is null. without: fields it
    has not.
    """
    formats = ("png", "webp", "jpeg") if kind == "image" else ("mp4", "webm", "gif")
    own_fields = {name: own(name, model) for name in fields.OWN[kind]} | {
        "output_format": choice("Form of the file.", *formats)
    }
    picture = text("An image.", format="binary") if form else PICTURE
    given = {
        name: picture_field(name, picture, form)
        for name in fields.PICTURES[kind]
        if name not in ("url", "reference_url")
    }
    idle = {
        name: choice(f"Accepted, and asks for nothing: {why}.", *free)
        for name, (free, why) in fields.IDLE.items()
        if free
    }
    names = {
        "prompt": option("prompt"),
        **given,
        **own_fields,
        **{name: option(name) for name in OPTIONS if name != "prompt"},
        **idle,
    }
    if not form:
        names |= {
            "extra_body": {
                "type": "object",
                "description": "More of these fields, as other servers have them nested.",
            }
        }
    names["prompt"] = text("What to show.", maxLength=fields.MOST_PROMPT)
    names = {name: schema for name, schema in names.items() if name not in without}
    return obj(
        {name: schema if form or name in required else nullable(schema) for name, schema in names.items()},
        required,
        closed=True,
    )


def picture_field(name: str, picture: Schema, form: bool) -> Schema:
    says = {
        "mask": "Where the image is inpainted: white, or transparent, there. Of the image's size.",
        "input_reference": "The first frame; for some models also the last, or references.",
    }.get(name, "The image to start from, or references. image[] and repeated parts give several.")
    several = {"anyOf": [picture, {"type": "array", "items": picture, "maxItems": fields.MOST_PICTURES}]}
    return {**(picture if form or name == "mask" else several), "description": says}


PICTURE: Schema = {
    "anyOf": [
        text("A data URI, or an address where the server fetches such."),
        obj({"image_url": text("The same.")}, closed=True),
        obj({"file_id": text("A file that this server made.")}, closed=True),
    ]
}

NUMBER = {"type": "number"}
FREE: Schema = {"type": "object"}
"""An object whose names depend on the model."""
STAMP = whole("Seconds since 1970.")

ERROR = obj({
    "error": obj({
        "message": text("One sentence that names the field, the value and what is allowed."),
        "type": text("Kind of error, by OpenAI's names."),
        "param": nullable(text("The field.")),
        "code": nullable(text("Why, in one word.")),
    })
})  # fmt: skip

PARAMETERS = {**FREE, "description": "Every effective parameter."}
WARNINGS = listed(
    text(""), "What of the request had no effect, such as how many tokens of the prompt were cut."
)
TIMINGS = {**FREE, "additionalProperties": NUMBER, "description": "Seconds of each stage."}
POSITION = nullable(whole("Jobs before it; 0 is next.", 0))
ETA = nullable({**NUMBER, "description": "Seconds until it is done, as measured before."})

STATUSES = choice("", "queued", "in_progress", "completed", "failed")
EXPIRES = nullable(STAMP | {"description": "When its files are removed."})
STEPS = {
    "computed_steps": nullable(whole("Steps that the network ran.")),
    "skipped_steps": nullable(whole("Steps that it did not need to.")),
}

SUMMARY = {
    "size": nullable(text("WIDTHxHEIGHT.")),
    "quality": text(""),
    "background": text(""),
    "output_format": text(""),
    "seed": nullable(whole("The seed of the first.")),
    "seeds": listed({"type": "integer"}, "The seed of each image."),
    "parameters": PARAMETERS,
    "warnings": WARNINGS,
    "timings": TIMINGS,
    **STEPS,
}
"""What every answer says of the images made."""

ADDRESS = text("An address that serves it for a while.")
OUTPUT = {
    "seed": whole("Its seed."),
    "media_type": text(""),
    "warning": text("What went wrong in storing it elsewhere."),
}

SAID: Schema = {
    "user": text("Who asks, as the request said."),
    "safety_identifier": text("The same, by its newer name."),
}
"""What answers repeat where the request said it."""

IMAGES = obj(optional=SAID, properties={
    "created": STAMP,
    "data": listed(obj({"b64_json": text("The file in base64."), "url": ADDRESS, **OUTPUT}, ("seed",))),
    "usage": {**FREE, "description": "Tokens, for clients that need them to be there; nothing is billed by them."},
    "id": text("The job's id."),
    "model": text("The model."),
    **SUMMARY,
})  # fmt: skip

IMAGE = obj(optional=SAID, properties={
    "id": text("Its id."),
    "object": choice("", "image"),
    "model": text("The model."),
    "status": STATUSES,
    "progress": whole("Percent.", 0, 100),
    "created_at": STAMP,
    "completed_at": nullable(STAMP),
    "expires_at": EXPIRES,
    "prompt": nullable(text("")),
    "queue_position": POSITION,
    "eta_s": ETA,
    "error": nullable({"$ref": "#/components/schemas/Error/properties/error"}),
    **SUMMARY,
    "data": listed(obj({"url": ADDRESS, **OUTPUT}, ("url", "seed"))),
})  # fmt: skip

VIDEO = obj(optional=SAID, properties={
    "id": text("Its id."),
    "object": choice("", "video"),
    "model": text("The model."),
    "status": STATUSES,
    "progress": whole("Percent.", 0, 100),
    "created_at": STAMP,
    "completed_at": nullable(STAMP),
    "expires_at": EXPIRES,
    "prompt": nullable(text("")),
    "size": nullable(text("WIDTHxHEIGHT.")),
    "seconds": nullable(text("Length of the clip.")),
    "remixed_from_video_id": nullable(text("The video that it is a remix of.")),
    "error": nullable(obj({"code": text("Why it failed; cancelled among others."), "message": text("")})),
    "parameters": PARAMETERS,
    "warnings": WARNINGS,
    "seeds": nullable(listed({"type": "integer"}, "The seed of each clip.")),
    "timings": nullable(TIMINGS),
    **STEPS,
    "queue_position": POSITION,
    "eta_s": ETA,
    "outputs": listed(
        obj({
            "seed": whole("Its seed."), "media_type": text(""), "bytes": whole("Size of the file.", 0), "url": ADDRESS,
            "warning": nullable(text("What went wrong in storing it elsewhere.")),
        }),
        "The videos, with URLs that serve them for a while.",
    ),
})  # fmt: skip

VIDEO_LIST = obj({
    "object": choice("", "list"),
    "data": listed({"$ref": "#/components/schemas/Video"}),
    "first_id": nullable(text("")),
    "last_id": nullable(text("Give it as `after` for the next page.")),
    "has_more": {"type": "boolean"},
})  # fmt: skip

MODEL = obj({
    "id": text("What `model` is to be."),
    "object": choice("", "model"),
    "created": STAMP,
    "owned_by": text(""),
    "root": text("The model's own name."),
    "parent": nullable(text("")),
    "task_type": text("The task that SGLang names it by."),
    "num_gpus": whole("", 0),
    "device": text("Where it runs."),
    "dit_precision": text("Type of the denoiser's weights."),
    "vae_precision": text("Type of the autoencoder's weights."),
    "precisions": {**FREE, "description": "Type of each component's weights."},
    "pipeline_name": text("The model's family."),
    "pipeline_class": text("The pipeline's class in diffusers."),
    "parameters": {"description": "How many the denoiser has."},
    "task_types": listed(text(""), "T2I, I2I, T2V, I2V: from text or images, to images or videos."),
    "defaults": {**FREE, "description": "What a request gets that leaves it out."},
    "sizes": {**FREE, "description": "What sizes must be multiples of, and how large they may be."},
    "input_images": {**FREE, "description": "How many images may be given, and as what."},
})  # fmt: skip
