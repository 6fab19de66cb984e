"""The spelling of options: SGLang Diffusion's names and forms become one dict of tinydiff's names.

Dashes and underscores are the same. `config` reads the values. Every flag of SGLang is known: what has no
meaning for `generate` is in `SERVER`, and what is not supported yet is in `unsupported`, so that none is
silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, get_origin

from tinydiff import config_file, paths, unsupported
from tinydiff.entries import Entries, EntryDict
from tinydiff.records import LONGEST, UserError, brief, nearest
from tinydiff.values import is_positional, of_python, options_of, read

ALIASES = {
    "precision": "dit_precision",
    "num_outputs": "num_outputs_per_prompt",
    "image_paths": "image_path",
    "sp_size": "sp_degree",
    "mode": "performance_mode",
    "prompt_file_path": "prompt_path",
    "pipeline": "pipeline_class_name",
    "dp_size": "data_parallel_size",
    "dp": "data_parallel_size",
    "layerwise_offload_modules": "layerwise_offload_components",
    "window_size": "spectrum_window_size",
    "flex_window": "spectrum_flex_window",
    "vae_config.use_tiling": "vae_tiling",
}
"""Other names of an option."""

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "2k": (1440, 2560), "4k": (2160, 3840)}
"""Flag that sets a size -> (height, width)."""

SHAPES = ("size", *SIZES)
"""Names that stand for height and width."""

TILES = {
    f"vae_config.tile_sample_{part}_{side}": (part, side)
    for part in ("min", "stride")
    for side in ("height", "width")
}
"""SGLang's options of the autoencoder's tiles, which stand for `vae_tile_size`. min: the side of a tile.
stride: the distance from one tile to the next.
"""
USUAL_TILE = 256
"""The side of SGLang's tiles where no option says otherwise, and that of ours."""

SPELLINGS = (*ALIASES, *SHAPES, *TILES, "prompt_path", "output_file_path", "no_save_output", "no_audio")
"""Names that stand for other options."""

COMPONENTS = """
    transformer transformer_2 text_encoder text_encoder_2 text_encoder_3 image_encoder vae tokenizer
    tokenizer_2 tokenizer_3 image_processor scheduler audio_vae vocoder connectors spatial_upsampler
    condition_image_encoder unet controlnet
""".split()
"""What `--<component>-path` may name. A model's model_index.json says which of them it has."""

MAPS = (
    "component_paths",
    "component_attention_backends",
    "component_precisions",
    "component_quantizations",
    "component_weights_paths",
    "loras",
    "refine_loras",
    "component_residency",
    "layerwise_prefetch_size",
    "layerwise_resident_layers",
    "layerwise_residency_policy",
    "diffusers_kwargs",
    "cache_dit_params",
)
"""Options that hold one value for each component or adapter: `a=x,b=y`, a JSON object, or `--name.a x`."""

SERVER = """
    host port http_graceful_shutdown_timeout enable_metrics strict_ports webui webui_port input_save_path
    served_model_name uvicorn_access_log_exclude_prefixes log_requests log_requests_level
    log_requests_format log_requests_target enable_cache_report warmup_resolutions warmup_num_frames
    warmup_steps warmup_sampling_params batching_mode batching_max_size batching_delay_ms batching_config
    enable_batching_metrics sleep_on_idle async_output_save scheduler_port scheduler_rpc_timeout
    disable_conditioning_cache conditioning_cache_max_size_mb disagg_role disagg_timeout
    disagg_downstream_wait_timeout disagg_dispatch_policy disagg_instance_id disagg_max_slots_per_instance
    disagg_transfer_redundancy disagg_role_device disagg_transfer_backend disagg_transfer_pool_size
    disagg_transfer_pin_memory disagg_p2p_hostname disagg_ib_device disagg_server_addr encoder_urls
    prompt_encoder_urls image_encoder_urls denoiser_urls decoder_urls encoder_tp denoiser_tp denoiser_sp
    denoiser_ulysses denoiser_ring decoder_sp api_key api_key_file admin_api_key cors_origin public_url
    state_dir state_url unfinished lease output_lifetime output_limit max_queue max_body max_input_pixels
    max_pixels max_outputs models allow_url_inputs idle_unload unload_to http_threads log_format
""".split()
"""Server options. `generate` ignores them and says so."""


def tokens(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Split a command line into (name, values).

    `--name a b` gives [a, b], `--name=a` gives [a], and `--name` alone gives True. A value may begin with
    "--" only after an equals sign. Raises UserError for a word that follows no flag.
    """
    if argv and not argv[0].startswith("--"):
        word = brief(argv[0])
        message = f"unexpected {word}; every value follows its flag, as in --prompt {word}"
        raise UserError("prompt", f"prompt: {message}")
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(argv)], strict=False):
        name, equals, value = argv[start][2:].partition("=")
        values = ([value] if equals else []) + list(argv[start + 1 : stop])
        yield name, values or True


def of_tool(argv: Sequence[str], record: type) -> EntryDict:
    """The options of a command whose record has one field without a flag, or none, as `collect`.

    A flag takes one value there, a switch `true`, `false` or none, and an option of several values all that
    follow. Further words are of the field without a flag.
    """
    kinds = {entry.name: kind for entry, kind in options_of(record)}
    loose = next((entry.name for entry, _ in options_of(record) if is_positional(entry)), "")
    words, pairs = [], []
    for name, values in tokens([f"--{loose}", *argv]):
        typed = [] if values is True else values
        kind = kinds.get(name.replace("-", "_"))
        takes = kind is not bool or typed[:1] in (["true"], ["false"])
        own = 0 if name == loose else len(typed) if get_origin(kind) is tuple else int(takes)
        words += typed[own:]
        if name != loose:
            pairs.append((name, typed[:own] or True))
    if words and not loose:
        raise UserError("command", f"unexpected {brief(words[0])}; this command takes flags only")
    return collect([(loose, words)] * bool(words) + pairs, kinds, dashes=True, foreign=False)


def from_command_line(
    argv: Sequence[str], names: Collection[str], repeatable: Collection[str] = ()
) -> tuple[EntryDict, EntryDict]:
    """What the `--config FILE` of a command line gives, and what the command line itself does, as `collect`.

    Raises UserError.
    """
    typed = collect(tokens(argv), [*names, "config"], dashes=True, repeatable=repeatable)
    path = typed.pop("config", None)
    entries = () if path is None else config_file.entries_of(one_text("config", path))
    return collect(entries, names), typed


def merged(file: Entries, typed: Entries) -> EntryDict:
    """The options of a config file, overridden by those of a command line; maps are joined."""
    maps = (*MAPS, *unsupported.MAPS)
    joined = {name: file[name] | typed[name] for name in maps if name in file and name in typed}
    return {**file, **typed, **joined}


def collect(
    pairs: Iterable[tuple[str, Any]],
    names: Collection[str],
    dashes: bool = False,
    repeatable: Collection[str] = (),
    foreign: bool = True,
) -> EntryDict:
    """Rename one source's (name, value) pairs to tinydiff's options; None means that an option is not given.

    Aliases, shorthands and forms per component are resolved. names: the options. dashes: whether messages
    write --flags or keys. Of a repeated name the last value counts, but of `repeatable` names all do.
    foreign: whether the other names of SGLang are known. Raises UserError for an unknown name, with the
    nearest one, and for two spellings of one option.
    """
    names = [*names, *(MAPS if foreign else ()), *(SHAPES if "height" in names else ())]
    options: EntryDict = {}
    spelled: dict[str, str] = {}

    def display(name: str) -> str:
        return f"--{name.replace('_', '-')}" if dashes else name

    for spelling, value in pairs:
        name = spelling[:LONGEST].replace("-", "_")
        if name not in names and not (foreign and _exists(name)):
            paths = (f"{component}_path" for component in COMPONENTS)
            others = [*SPELLINGS, *paths, *SERVER, *unsupported.OPTIONS] if foreign else []
            hint = nearest(display(name), map(display, [*names, *others]))
            raise UserError(name, f"{display(name)}: no such {'flag' if dashes else 'key'}{hint}")
        for option, part, meaning in () if value is None else _meanings(name, value, names):
            key = option if part is None else f"{option}.{part}"
            if spelled.setdefault(key, name) != name:
                either = f"give either {display(spelled[key])} or {display(name)}, not both"
                raise UserError(option, f"{option}: {either}")
            if part is not None:  # "" is a component's name too, of one that does not exist
                options.setdefault(option, {})[part] = meaning
            elif option in repeatable and option in options:
                options[option] = [*_as_list(options[option]), *_as_list(meaning)]
            else:
                options[option] = meaning
    if "tile_sample" in options:
        _set_tile(options, options.pop("tile_sample"), display)
    return options


def _set_tile(options: dict[str, Any], given: Mapping[str, int], display: Callable[[str], str]) -> None:
    """Set `vae_tile_size` from SGLang's options of tiles, where they ask for another side than the usual one.

    Ours are square and overlap by a quarter. Raises UserError for others.
    """
    sides = {name: given.get(f"min.{name}", USUAL_TILE) for name in ("height", "width")}
    side = sides["height"]
    names = {(part, name): display(spelling) for spelling, (part, name) in TILES.items()}
    if side != sides["width"]:
        both = f"{names['min', 'height']} {side} and {names['min', 'width']} {sides['width']}"
        raise UserError("vae_tile_size", f"vae_tile_size: tiles are square; give {both} one value")
    for name in ("height", "width"):
        if (stride := given.get(f"stride.{name}", side * 3 // 4)) != side * 3 // 4:
            message = f"{names['stride', name]}: {stride} cannot be used; tiles overlap by a quarter"
            raise UserError("vae_tile_size", f"vae_tile_size: {message}, so here it is {side * 3 // 4}")
    if side != USUAL_TILE:
        if "vae_tile_size" in options:
            either = f"give either {display('vae_tile_size')} or {names['min', 'height']}, not both"
            raise UserError("vae_tile_size", f"vae_tile_size: {either}")
        options["vae_tile_size"] = side


def _exists(name: str) -> bool:
    """Whether `name` is a spelling of some option of SGLang."""
    spellings = (SPELLINGS, SERVER, unsupported.OPTIONS)
    return any(name in each for each in spellings) or _is_map(name) or _component(name) is not None


def _is_map(name: str) -> bool:
    return name.partition(".")[0] in (*MAPS, *unsupported.MAPS)


def _component(name: str) -> str | None:
    """The component in a name such as `vae_path`."""
    for component in COMPONENTS:
        if name.startswith(f"{component}_") and name.removeprefix(f"{component}_") in _PER_COMPONENT:
            return component
    return None


def per_component(name: str) -> str | None:
    """The option that a name with a component belongs to: component_paths of vae_path."""
    component = _component(name)
    return None if component is None else _PER_COMPONENT[name.removeprefix(f"{component}_")]


def _meanings(name: str, value: object, names: Collection[str]) -> Iterator[tuple[str, str | None, Any]]:
    """What one flag means, as (option, component, value)."""
    if name in ALIASES:
        yield from _meanings(ALIASES[name], value, names)
    elif name in SIZES:
        if read(name, bool, value):
            height, width = SIZES[name]
            yield from (("height", None, height), ("width", None, width))
    elif name == "size":
        width, cross, height = (text := one_text(name, value)).lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and len(text) < LONGEST):
            raise UserError(name, f"{name}: {brief(text)} is not WIDTHxHEIGHT, such as 1280x720")
        yield from (("width", None, width), ("height", None, height))
    elif name in TILES:
        yield "tile_sample", ".".join(TILES[name]), read(name, int, value)
    elif name in ("no_save_output", "no_audio"):
        yield name.removeprefix("no_"), None, not read(name, bool, value)
    elif name == "output_file_path":
        path = one_text(name, value)
        directory, slash, file = path.rstrip("/").rpartition("/")
        yield "output_path", None, directory or slash or "."
        yield "output_file_name", None, file + "/" * path.endswith("/")  # a final / is a directory of frames
    elif name == "prompt_path":
        yield "prompt", None, _prompts(one_text(name, value))
    elif _is_map(name):
        option, _, part = name.partition(".")
        pairs = [(part, _value_of(option, value))] if part else _pairs(option, value)
        yield from ((option, *pair) for pair in pairs)
    elif name not in names and (component := _component(name)):
        yield _PER_COMPONENT[name.removeprefix(f"{component}_")], component, value
    else:
        yield name, None, value


_PER_COMPONENT = {
    "path": "component_paths",
    "weights_path": "component_weights_paths",
    "quantization": "component_quantizations",
}


def refusal(name: str, value: Any) -> str | None:
    """The sentence that refuses an unsupported option; None where `value` turns its feature off."""
    feature, inert = unsupported.OPTIONS[name]
    value = of_python(value)
    each_value = value.values() if name in unsupported.MAPS else [value]
    if all(_normal(_spelled(part)) in (*inert, "") for part in each_value):
        return None
    return f"{name}: {brief(_spelled(value))} cannot be used; {unsupported.sentence(feature)}"


def _normal(text: str) -> str:
    """Lower case, and one spelling for each number."""
    with suppress(ValueError):
        return f"{float(text):g}"
    return text.lower()


def _spelled(value: object) -> str:
    """A value as the user wrote it, a long one cut."""
    if isinstance(value, Mapping):
        return ",".join(f"{part}={_words(inner)}" for part, inner in islice(value.items(), LONGEST))
    return _words(value)


def _words(value: object) -> str:
    return " ".join(map(_word, value[:LONGEST])) if isinstance(value, list | tuple) else _word(value)


def _word(value: object) -> str:
    return value[: LONGEST + 1] if isinstance(value, str) else brief(value)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_text(name: str, value: object) -> str:
    """The string of an option that takes exactly one. Raises UserError."""
    words = _as_list(value)
    if len(words) != 1 or not isinstance(words[0], str):
        got = "none" if value is True else brief(words)
        raise UserError(name, f"{name}: takes one string and was given {got}")
    return words[0]


def _prompts(path: str) -> list[str]:
    """The prompts of a text file, one per line."""
    if not path.lower().endswith(".txt"):
        raise UserError("prompt_path", f"prompt_path: {path!r} must be a .txt file with one prompt per line")
    lines = paths.lines(paths.read_text(path, "prompt_path"))
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("prompt_path", f"prompt_path: {path!r} contains no prompt")
    return prompts


_PAIRS = {
    "loras": "style=0.8,ink=0.3",
    "refine_loras": "distilled=0.5",
    "component_residency": "transformer=layerwise-offload,vae=resident",
    "layerwise_prefetch_size": "transformer=2,text_encoder=1",
    "layerwise_resident_layers": "transformer=10,text_encoder=0.5",
    "layerwise_residency_policy": "transformer=strided",
    "diffusers_kwargs": "clip_skip=1,eta=0.5",
    "cache_dit_params": "warmup=8,rdt=0.12",
    "": "transformer=sdpa,text_encoder=math",
}
"""An example of each map."""


def _pairs(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """The (component, value) pairs of a map: a mapping, a JSON object, or `a=x,b=y`."""
    if isinstance(value, Mapping):
        yield from ((_word(key), inner) for key, inner in value.items())
        return
    text = ",".join(word if isinstance(word, str) else brief(word) for word in _as_list(value))
    if text.lstrip().startswith("{"):
        try:
            yield from json.loads(text).items()
            return
        except (ValueError, RecursionError) as error:
            raise UserError(name, f"{name}: {brief(text)} is not a JSON object") from error
    for pair in text.split(","):
        key, equals, inner = (part.strip() for part in pair.partition("="))
        if not (key and equals and inner):
            example = _PAIRS.get(name, _PAIRS[""])
            raise UserError(name, f"{name}: {brief(text)} must be pairs such as {example}")
        yield key, _value_of(name, inner)


def _value_of(name: str, value: object) -> Any:
    """A value of a map. Words of `diffusers_kwargs`, whose values have any type, are read as JSON."""
    words = _as_list(value)
    if name != "diffusers_kwargs" or len(words) != 1 or not isinstance(words[0], str):
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(words[0])
    return words[0]
