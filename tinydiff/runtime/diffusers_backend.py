"""Any pipeline that diffusers loads, as a model: read before its weights, loaded, and called for one output.

The only module that a request passes through which imports diffusers. It comes with the extra `diffusers`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from tinydiff import config_file, paths
from tinydiff.config import ModelOptions
from tinydiff.entries import Entries, EntryDict, is_array
from tinydiff.io import hub
from tinydiff.io.hub import read_json
from tinydiff.models import registry
from tinydiff.models.registry import ReleasedModel
from tinydiff.records import UserError, brief, check_known, nearest
from tinydiff.runtime import foreign_placement, foreign_settings, loras
from tinydiff.runtime.blueprint import DTYPES, SHIPPED, Blueprint, Model, here
from tinydiff.runtime.foreign import Foreign, Untyped
from tinydiff.runtime.foreign_call import OUTPUTS
from tinydiff.runtime.foreign_settings import DENOISERS, explained

log = logging.getLogger(__name__)

INSTALL = "`pip install 'tinydiff[diffusers]'` adds diffusers, which runs many more pipelines"
TAKEN = frozenset(
    """
    model_path revision trust_remote_code variant component_paths lora_path lora_nickname lora_scale
    lora_weight_name lora_merge_mode dit_precision vae_precision text_encoder_precisions
    image_encoder_precision component_precisions upscaling_model_path
    frame_interpolation_model_path vae_tiling vae_slicing
    performance_mode dit_cpu_offload text_encoder_cpu_offload image_encoder_cpu_offload vae_cpu_offload
    cpu_offload_components dit_layerwise_offload layerwise_offload_components component_residency
    dit_offload_prefetch_size pin_cpu_memory enable_torch_compile backend pipeline_class_name
    diffusers_attention_backend cache_dit_config diffusers_quantization_config
    """.split()
)
"""Model options that have an effect on a pipeline of diffusers."""
MODULAR = "modular_model_index.json"
"""The file of a repository of modular blocks."""


def installed() -> bool:
    """Whether diffusers is installed."""
    return find_spec("diffusers") is not None


def _library() -> Untyped:
    """The package diffusers. Raises UserError where it is not installed."""
    if not installed():
        raise UserError("backend", f"backend: 'diffusers' is not installed; {INSTALL}")
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def read(options: ModelOptions) -> Blueprint:
    """What is known of a pipeline and its model before any weight is read. Raises UserError."""
    defaults = ModelOptions()
    for entry in fields(ModelOptions):
        value = getattr(options, entry.name)
        if entry.name not in TAKEN and value != getattr(defaults, entry.name):
            message = f"{brief(value)} is for tinydiff's own code; --backend diffusers does not take it"
            raise UserError(entry.name, f"{entry.name}: {message}")
    library = _library()
    directory = _directory(library, options)
    index = _index(directory, options)
    if (directory / MODULAR).is_file():
        for name in ("pipeline_class_name", "diffusers_quantization_config"):
            if getattr(options, name) is not None:
                raise UserError(name, f"{name}: {options.model_path!r} has modular blocks, which take none")
        pipeline, takes = _modular(library, directory, options)
    else:
        pipeline = _pipeline_class(library, directory, index, options)
        takes = _takes(pipeline)
    precisions = _precisions(index, options)
    for name in options.component_paths:
        check_known("component_paths", name, list(components_of(index)))
    foreign_placement.check(options)
    _quantization(options, components_of(index))
    foreign = Foreign(
        library="diffusers",
        version=library.__version__,
        pipeline=pipeline,
        directory=directory,
        options=options,
        precisions=precisions,
        **takes,
        adapters=loras.chosen(options),
    )
    return Blueprint(
        _row(foreign, options.model_path),
        named=True,
        nets={},
        tokenizers={},
        scheduler={},
        options={},
        compiled=options.enable_torch_compile,
        tiling=options.vae_tiling,
        variant=options.variant,
        upscaling_model_path=options.upscaling_model_path,
        frame_interpolation_model_path=options.frame_interpolation_model_path,
        foreign=foreign,
    )


def _takes(pipeline: type[Untyped]) -> EntryDict:
    """What a call of a class takes, as fields of `Foreign`."""
    parameters = list(inspect.signature(pipeline.__call__).parameters.values())[1:]
    named = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
    own = not pipeline.__module__.startswith("diffusers.")  # diffusers' classes take **kwargs and drop them
    return {
        "arguments": {each.name: None if each.default is each.empty else each.default for each in named},
        "needed": tuple(each.name for each in named if each.default is each.empty),
        "open": own and len(named) < len(parameters),
    }


def _modular(library: Untyped, directory: Path, options: ModelOptions) -> tuple[type[Untyped], EntryDict]:
    """The class of a pipeline of blocks, and what its blocks take."""
    with explained("model_path", f"read the blocks of {options.model_path!r}"):
        pipe = _blocks_of(library, directory, options)
        inputs = [each for each in pipe.blocks.inputs if each.name]
        outputs = [each.name for each in pipe.blocks.outputs]
        output = next((name for name in OUTPUTS if name in outputs), None)
    if output is None:
        message = f"the blocks of {options.model_path!r} make {', '.join(outputs) or 'nothing'}"
        raise UserError("model_path", f"model_path: {message}, and neither images nor frames")
    return cast(type[Untyped], type(pipe)), {
        "arguments": {each.name: each.default for each in inputs},
        "needed": (),  # which of them are needed depends on the blocks that run
        "open": False,
        "output": output,
    }


def _blocks_of(library: Untyped, directory: Path, options: ModelOptions) -> Untyped:
    """A pipeline of blocks without its networks. Raises UserError for code that is not trusted."""
    stored = read_json(directory / MODULAR)
    code = "auto_map" in stored or (directory / "modular_config.json").is_file()
    if code and not options.trust_remote_code:
        message = f"{options.model_path!r} brings blocks of its own, whose code runs on this machine"
        raise UserError("trust_remote_code", f"trust_remote_code: {message}; the flag allows that")
    trusted = {"trust_remote_code": True} if options.trust_remote_code else {}
    return library.ModularPipeline.from_pretrained(str(directory.absolute()), **trusted)


def _directory(library: Untyped, options: ModelOptions) -> Path:
    """The model's directory; what diffusers needs of a hub id is downloaded."""
    if options.model_path == registry.SHIPPED:
        return SHIPPED
    path = paths.path(options.model_path, "model_path")
    if (kind := paths.kind(path)) == "directory":
        return hub.resolve(path, options.revision)  # refuses a revision
    if kind == "file":
        message = f"{str(path)!r} is a file; --backend diffusers takes a directory or a hub id"
        raise UserError("model_path", f"model_path: {message}")
    described = hub.resolve(options.model_path, options.revision, weights=False)
    if (described / MODULAR).is_file():
        code = ("*.py", "*/*.py")
        return hub.resolve(options.model_path, options.revision, variant=options.variant, also=code)
    with explained("model_path", f"fetch {options.model_path!r}"):
        return Path(
            library.DiffusionPipeline.download(
                options.model_path,
                revision=options.revision,
                variant=options.variant,
                trust_remote_code=options.trust_remote_code,
            )
        )


def _index(directory: Path, options: ModelOptions) -> EntryDict:
    modular = directory / MODULAR
    file = modular if modular.is_file() else directory / "model_index.json"
    if not file.is_file():
        message = f"{options.model_path!r} has no model_index.json, by which diffusers knows a pipeline"
        raise UserError("model_path", f"model_path: {message}")
    return dict(read_json(file))


def components_of(index: Entries) -> dict[str, tuple[str, str]]:
    """Component -> (library, class)."""
    pairs = {name: value for name, value in index.items() if is_array(value) and len(value) > 1}
    return {
        name: (a, b)
        for name, (a, b, *_) in pairs.items()
        if name[0] != "_" and isinstance(a, str) and isinstance(b, str)
    }


def _pipeline_class(
    library: Untyped, directory: Path, index: Entries, options: ModelOptions
) -> type[Untyped]:
    """The class that runs the model: diffusers' own, or one in the model's code where that is trusted."""
    named, field = index.get("_class_name"), "model_path"
    if options.pipeline_class_name is not None:
        named, field = options.pipeline_class_name, "pipeline_class_name"
    code = [name for name, (module, _) in components_of(index).items() if _brings(directory, name, module)]
    file = f"{named[0]}.py" if is_array(named) else ""
    if not options.trust_remote_code and (file or code):
        what = file or f"the component {code[0]!r}"
        message = f"{options.model_path!r} brings code of its own ({what}), which runs on this machine"
        raise UserError("trust_remote_code", f"trust_remote_code: {message}; the flag allows that")
    if is_array(named):
        from diffusers.utils import dynamic_modules_utils

        load_class = cast(Untyped, dynamic_modules_utils).get_class_from_dynamic_module  # it is not annotated
        with explained("model_path", f"load {named[-1]} from {file}"):
            return load_class(str(directory.absolute()), file, class_name=named[-1], trust_remote_code=True)
    found = getattr(library, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, library.DiffusionPipeline)):
        known = [name for name in dir(library) if name.endswith("Pipeline")]
        message = f"diffusers {library.__version__} has no pipeline class {brief(named)}"
        raise UserError(field, f"{field}: {message}{nearest(str(named), known)}")
    return found


def _brings(directory: Path, component: str, module: str | None) -> bool:
    """Whether a component's class is in the model's own code."""
    return bool(module) and (directory / component / f"{module}.py").is_file()


def _precisions(index: Entries, options: ModelOptions) -> dict[str, str]:
    """Component -> its type: as asked, else bf16 on a GPU and fp32 on a CPU."""
    usual = "fp32" if here().type == "cpu" else "bf16"
    models = [
        name
        for name in components_of(index)
        if not re.match("tokenizer|scheduler|.*_(extractor|processor)", name)
    ]
    encoders = [name for name in models if name.startswith("text_encoder")]
    if len(options.text_encoder_precisions) > len(encoders):
        message = f"{len(options.text_encoder_precisions)} are given; text encoders: {len(encoders)}"
        raise UserError("text_encoder_precisions", f"text_encoder_precisions: {message}")
    for name in options.component_precisions:
        check_known("component_precisions", name, models)
    asked = {name: options.dit_precision for name in DENOISERS}
    asked |= {"vae": options.vae_precision, "image_encoder": options.image_encoder_precision}
    asked |= dict(zip(encoders, options.text_encoder_precisions, strict=False))
    asked |= options.component_precisions
    return {name: asked.get(name) or usual for name in models}


def _quantization(options: ModelOptions, components: Collection[str]) -> Untyped:
    """How diffusers is to quantise the components; None where the options do not say. Raises UserError."""
    field, file = "diffusers_quantization_config", options.diffusers_quantization_config
    if file is None:
        return None
    try:
        entries = dict(config_file.entries_of(file))
    except UserError as error:
        raise UserError(field, f"{field}{str(error).removeprefix('config')}") from error
    names = ("quant_backend", "quant_kwargs", "components_to_quantize")
    for name in entries:
        check_known(field, name, names)
    for name in entries.get("components_to_quantize") or ():
        check_known(field, name, components)
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    with explained(field, f"quantise as {file!r} says"):
        return PipelineQuantizationConfig(**entries)


def _row(foreign: Foreign, name: str) -> ReleasedModel:
    """The defaults of a request, as far as the class and the JSON files tell them."""
    arguments = foreign.arguments
    video = next((each for each in ("num_frames", "video_length") if each in arguments), None)
    frames = 1 if video is None else arguments[video] or _entry(foreign, "sample_frames") or 16
    side = _side(foreign)
    takes_image = next((each for each in ("image", "images") if each in arguments), None)
    return ReleasedModel(
        name,
        foreign.library,
        foreign.class_name,
        height=_whole(arguments.get("height")) or side,
        width=_whole(arguments.get("width")) or side,
        steps=_whole(arguments.get("num_inference_steps")) or 1,
        guidance=float(arguments.get("guidance_scale") or 1.0),
        params=0,
        shape={},
        num_frames=frames,
        fps=_whole(arguments.get("fps") or arguments.get("frame_rate")) or 16,
        text_tokens=_whole(arguments.get("max_sequence_length")) or 512,
        size_multiple=8,
        frame_multiple=1,
        images=(0, 0) if takes_image is None else (int(takes_image in foreign.needed), 16),
        image_use="references",
    )


def _whole(value: Untyped) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _entry(foreign: Foreign, name: str) -> Untyped:
    """An entry of the denoiser's config.json."""
    files = (foreign.directory / each / "config.json" for each in DENOISERS)
    return next((read_json(file).get(name) for file in files if file.is_file()), None)


def _side(foreign: Foreign) -> int:
    """The side of an image of the size that the denoiser was made for."""
    sample = _entry(foreign, "sample_size")
    file = foreign.directory / "vae" / "config.json"
    levels = read_json(file).get("block_out_channels") if file.is_file() else None
    if not isinstance(sample, int):
        return 1024
    return sample * (2 ** (len(levels) - 1) if is_array(levels) else 1)


def load(
    blueprint: Blueprint,
    ranks: object = None,
    merge_adapters: bool = False,
    requests: Sequence[object] = (),
) -> Model:
    """Load the pipeline and set what the options ask for. Raises UserError."""
    foreign = blueprint.foreign
    assert foreign is not None
    options, directory = foreign.options, foreign.directory
    index = _index(directory, options)
    types = {name: DTYPES[each] for name, each in foreign.precisions.items()}
    others = {
        name: _component(*components_of(index)[name], path, types.get(name), f"{name}_path")
        for name, path in options.component_paths.items()
    }
    with explained("model_path", f"load {options.model_path!r}"):
        if foreign.output is not None:
            pipe = _blocks_of(_library(), directory, options)
            pipe.update_components(**others)
            usual = torch.float32 if here().type == "cpu" else torch.bfloat16
            pipe.load_components(dtype={**types, "default": usual}, variant=options.variant)
        else:
            pipe = foreign.pipeline.from_pretrained(
                str(directory.absolute()),
                dtype=types,
                variant=options.variant,
                trust_remote_code=options.trust_remote_code,
                quantization_config=_quantization(options, components_of(index)),
                **others,
            )
    foreign_settings.set_vae(pipe, options)
    foreign_settings.load_loras(pipe, foreign)
    foreign_settings.set_attention(pipe, options.diffusers_attention_backend)
    foreign_settings.set_cache(pipe, options.cache_dit_config)
    foreign_placement.place(pipe, options, here(), tuple(foreign.precisions))
    if options.enable_torch_compile:
        foreign_settings.compile_blocks(pipe)
    return Model(blueprint, {}, {}, pipe=pipe)


def _component(library: str, class_name: str, path: str, dtype: Untyped, option: str) -> Untyped:
    """The component at a path, of the class that its own config names, else of the listed one."""
    from diffusers.pipelines import pipeline_loading_utils

    class_of = cast(Untyped, pipeline_loading_utils).simple_get_class_obj  # it is not annotated
    place = paths.path(path, option)
    kind, stored = paths.kind(place), place / "config.json"
    entries = read_json(stored) if kind == "directory" and stored.is_file() else {}
    names = (entries.get("_class_name"), *(entries.get("architectures") or ()), class_name)
    named = next(name for name in names if name)
    with explained(option, f"load {path!r} as a {named}"):
        found = class_of(library, named)
        more = {"dtype": dtype} if hasattr(found, "forward") else {}
        if kind == "file":
            return found.from_single_file(str(place), **more)
        return found.from_pretrained(path if kind != "directory" else str(place), **more)
