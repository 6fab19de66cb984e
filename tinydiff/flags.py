"""The spelling of options: SGLang Diffusion's names and forms, from a command line or a file, as one flat
dict of tinydiff's names.

Dashes and underscores are alike. An option that tinydiff has keeps its value for `config.py` to read; the
long tail that it does not have is here as two tables, so that every flag of SGLang is known, and none is
taken without effect or a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from tinydiff import paths
from tinydiff.records import LONGEST, UserError, nearest, shown
from tinydiff.values import of_python, read

_words = str.split

ALIASES = {
    "precision": "dit_precision", "num_outputs": "num_outputs_per_prompt", "image_paths": "image_path", "sp_size": "sp_degree",
    "mode": "performance_mode", "prompt_file_path": "prompt_path", "pipeline": "pipeline_class_name", "dp_size": "data_parallel_size",
    "dp": "data_parallel_size", "layerwise_offload_modules": "layerwise_offload_components", "window_size": "spectrum_window_size",
    "flex_window": "spectrum_flex_window", "vae_config.use_tiling": "vae_tiling",
}  # fmt: skip

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "2k": (1440, 2560), "4k": (2160, 3840)}
"""Size shorthands: (height, width)."""

SPELLINGS = (*ALIASES, *SIZES, "prompt_path", "output_file_path", "no_save_output")
"""Names that stand for others."""

COMPONENTS = (
    "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "vae", "tokenizer", "tokenizer_2",
    "tokenizer_3", "image_processor", "scheduler", "audio_vae", "vocoder", "connectors", "spatial_upsampler", "condition_image_encoder",
)  # fmt: skip
"""What `--<component>-path` may name; which of them a model has, its model_index.json says."""

MAPS = ("component_paths", "component_attention_backends", "component_precisions")
"""Options that hold a value per component: `a=x,b=y`, a JSON object, or `--name.a x`."""

LATER_MAPS = (
    "component_quantizations", "component_quantization_ignored_layers", "component_weights_paths", "component_direct_gpu_weight_loading",
)  # fmt: skip

SERVER = _words("""
    host port http_graceful_shutdown_timeout enable_metrics strict_ports webui webui_port input_save_path served_model_name
    uvicorn_access_log_exclude_prefixes log_requests log_requests_level log_requests_format log_requests_target enable_cache_report
    warmup_resolutions warmup_num_frames warmup_steps warmup_sampling_params batching_mode batching_max_size batching_delay_ms
    batching_config enable_batching_metrics sleep_on_idle async_output_save scheduler_port scheduler_rpc_timeout
    disable_conditioning_cache conditioning_cache_max_size_mb disagg_role disagg_timeout disagg_downstream_wait_timeout
    disagg_dispatch_policy disagg_instance_id disagg_max_slots_per_instance disagg_transfer_redundancy disagg_role_device
    disagg_transfer_backend disagg_transfer_pool_size disagg_transfer_pin_memory disagg_p2p_hostname disagg_ib_device disagg_server_addr
    encoder_urls prompt_encoder_urls image_encoder_urls denoiser_urls decoder_urls encoder_tp denoiser_tp denoiser_sp denoiser_ulysses
    denoiser_ring decoder_sp
    api_key api_key_file admin_api_key cors_origin public_url state_dir state_url unfinished lease output_lifetime output_limit max_queue
    max_body max_input_pixels max_pixels max_outputs allow_url_inputs idle_unload http_threads log_format
""")
"""Flags of a server: `generate` ignores them and says so."""

LATER: dict[str, str] = {
    "this way of running on several GPUs": "kv_gather_degree=1 hsdp_replicate_dim=1 hsdp_shard_dim=1 enable_nccl_nvls=false "
    "enable_sequence_shard=false vae_config.use_parallel_tiling=true|false vae_config.use_parallel_decode=true|false "
    "vae_config.parallel_decode_mode=auto diffusion_decoder_parallel_tiling=true|false",
    "choosing a GPU by number": "base_gpu_id=0 gpu_ids=0 numa_node=0",
    "LoRA": "lora_path= lora_nickname=default lora_scale=1 lora_alpha= lora_merge_mode=auto lora_weight_name=",
    "quantisation": "quantization= quantization_ignored_layers= component_quantizations= component_quantization_ignored_layers= "
    "enable_svdquant=false quantization_precision= quantization_rank= quantization_act_unsigned=false dit_config.quant_config= "
    "kv_cache_quant=off kv_cache_quant_centroids= kv_cache_quant_block_size= kv_cache_quant_stages= kv_cache_quant_iters= "
    "kv_cache_quant_asymmetric=false kv_cache_quant_keep_recent= kv_cache_quant_sink= kv_cache_quant_sink_keep=",
    "loading a component's weights from elsewhere": "component_weights_paths= direct_gpu_weight_loading=false "
    "component_direct_gpu_weight_loading=false dit_config.prefix= vae_config.load_encoder=true vae_config.load_decoder=true",
    "offload": "component_residency= dit_cpu_offload=false cpu_offload_components=none dit_layerwise_offload=false "
    "layerwise_offload_components= dit_offload_prefetch_size=0 dit_layerwise_resident_layers=0 layerwise_prefetch_size= "
    "layerwise_resident_layers= layerwise_residency_policy= layerwise_residency_lifetime= dit_layerwise_residency_policy=leading "
    "dit_layerwise_residency_lifetime=forward text_encoder_cpu_offload=false image_encoder_cpu_offload=false vae_cpu_offload=false "
    "pin_cpu_memory=true|false offload_during_compile=true|false ltx2_two_stage_device_mode=",
    "a performance preset": "performance_mode=auto|manual",
    "caching between steps": "enable_teacache=false enable_cache_dit=false cache_dit_params= cache_dit_config= cfg_gate_step=1 "
    "enable_spectrum=false w= taylor_order= history_size= spectrum_window_size= spectrum_flex_window= spectrum_warmup_steps= spectrum_m= "
    "spectrum_lam= spectrum_tau_num_steps=",
    "settings of a sparse attention": "attention_backend_config= mask_strategy_file_path= moba_config_path=",
    "switching attention for one request": "attention_backend_override=",
    "this way of compiling": "regional_compile=false enable_breakable_cuda_graph=false bcg_text_buckets= dit_config.torch_compile_mode=",
    "this numeric switch": "allow_cudnn_tf32=true allow_bf16_reduced_precision_reduction=true disable_autocast=true quality=lossless "
    "vae_decode_precision=",
    "this setting of tiles": "vae_slicing=false vae_config.tile_sample_min_height=256 vae_config.tile_sample_min_width=256 "
    "vae_config.tile_sample_min_num_frames=16 vae_config.tile_sample_stride_height=192 vae_config.tile_sample_stride_width=192 "
    "vae_config.tile_sample_stride_num_frames=12 vae_config.blend_num_frames= vae_config.use_temporal_tiling=false "
    "diffusion_decoder_tiling=true|false",
    "the diffusers backend": "trust_remote_code=false diffusers_kwargs= diffusers_attention_backend=",
    "choosing another pipeline or scheduler": "pipeline_class_name= pipeline_config_path= model_subfolder= model_variant= "
    "scheduler_class_override= task_type= data_type= no_override_protected_fields=false text_encoder_configs=",
    "this form of guidance": "guidance_rescale=0 enable_cfg_renorm=false cfg_renorm_min= embedded_cfg_scale=6",
    "drawing noise on a device (it is drawn on the CPU, so that a seed means one image everywhere)": "generator_device=cpu",
    "changing the number of frames by itself": "adjust_frames=true|false num_frames_round_down=false",
    "returning the steps between": "return_trajectory_latents=false return_trajectory_decoded=false return_file_paths_only=true|false",
    "starting at a low resolution": "progressive_mode=fullres progressive_levels=1 progressive_delta=0.01",
    "frame interpolation": "enable_frame_interpolation=false frame_interpolation_exp=1 frame_interpolation_scale=1 "
    "frame_interpolation_model_path=",
    "upscaling": "enable_upscaling=false upscaling_model_path= upscaling_scale=4",
    "profiling": "profile=false num_profiled_timesteps=5 profile_all_stages=false enable_layerwise_nvtx_marker=false debug=false "
    "enable_trace=false otlp_traces_endpoint= otlp_service_name=",
    "warming up before a request": "warmup_mode=off|server",
    "rewriting prompts": "pe_server_url= prompt_enhancer_config= enable_prompt_rewrite=false srt_encoder_url= "
    "srt_encoder_connection_timeout=3.05 srt_encoder_timeout=100",
    "video input": "video_path=",
    "sound": "sound_duration=0",
    "reinforcement learning": "rollout=false rollout_sde_type=sde rollout_noise_level=0.7 rollout_log_prob_no_const=false "
    "rollout_debug_mode=false",
    "the model family that this belongs to": "minimax_h3_adaln_online=false minimax_h3_adaln_plan_width=4 minimax_h3_adaln_host_cache_gb=8 "
    "minimax_h3_adaln_cache_path= load_diffusion_decoder=false use_diffusion_decoder=false auto_duration=false "
    "auto_duration_min_seconds= auto_duration_max_seconds= resolution= streaming=false refiner_chunked=false num_frame_per_block= "
    "realtime_causal_sink_size= realtime_causal_kv_cache_num_frames= action= translation_speed= rotation_speed_deg= pitch_limit_deg= "
    "sr_resolution_scale= sr_num_steps= sr_tiles_batch_size= sr_tile_min_overlap= sr_target_resolution= sr_target_resize_mode= "
    "action_mode= domain_id= domain_name= raw_action_dim= action_fps= bot_task= system_prompt= max_sequence_length= distilled_lora_path= "
    "flux3_alpha= flux3_compile_text_encoder=false flux3_text_encoder_fp8=false flux3_keep_visual_vae_resident=false "
    "flux3_dit_keep_non_layer=false flux3_skip_empty_cache_after_request=false",
}
"""What does not exist yet: a feature, its flags, and behind each flag the values that ask for nothing (`a|b`;
none: every value asks).
"""

_OFF = {
    name: (feature, values.split("|") if values else [])
    for feature, rows in LATER.items()
    for name, _, values in (row.partition("=") for row in rows.split())
}

LATER_NAMES = frozenset(_OFF)
"""The names in `LATER`."""


def tokens(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Split a command line into (name, values): `--name a b` gives [a, b], `--name=a` gives [a], and `--name`
    alone gives True.

    A value begins with "--" only after an equals sign. Raises UserError for a word that belongs to no flag.
    """
    if argv and not argv[0].startswith("--"):
        word = shown(argv[0])
        raise UserError(
            "prompt", f"prompt: unexpected {word}; every value follows its flag, as in --prompt {word}"
        )
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(argv)], strict=False):
        name, equals, value = argv[start][2:].partition("=")
        values = ([value] if equals else []) + list(argv[start + 1 : stop])
        yield name, values or True


def collect(
    pairs: Iterable[tuple[str, Any]],
    known: Iterable[str],
    dashes: bool = False,
    several: Collection[str] = (),
) -> dict[str, Any]:
    """Bring one source's (name, value) pairs to tinydiff's names: aliases, shorthands and per-component forms
    are resolved. What is None is not given.

    known: the names of the options. dashes: whether to speak of flags or of keys. The last of a repeated name
    counts, but of the names in `several` all do. Raises UserError for an unknown name, with the nearest one,
    and for two spellings of one option.
    """
    known = [*known, *MAPS]
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}

    def show(name: str) -> str:
        return f"--{name.replace('_', '-')}" if dashes else name

    for spelling, value in pairs:
        given = spelling[:LONGEST].replace("-", "_")
        if not _exists(given, known):
            names = [*known, *SPELLINGS, *(f"{component}_path" for component in COMPONENTS), *SERVER, *_OFF]
            hint = nearest(show(given), [show(n) for n in names])
            raise UserError(given, f"{show(given)}: no such {'flag' if dashes else 'key'}{hint}")
        for name, part, meant in () if value is None else _meanings(given, value, known):
            key = name if part is None else f"{name}.{part}"
            if spelled.setdefault(key, given) != given:
                raise UserError(name, f"{name}: give either {show(spelled[key])} or {show(given)}, not both")
            if part is not None:  # "" is a component's name too, of none that exists
                found.setdefault(name, {})[part] = meant
            elif name in several and name in found:
                found[name] = [*_listed(found[name]), *_listed(meant)]
            else:
                found[name] = meant
    return found


def _exists(given: str, known: Collection[str]) -> bool:
    """Whether `given` is a spelling of some option."""
    return (
        any(given in names for names in (known, SPELLINGS, SERVER, _OFF))
        or _is_map(given)
        or _component(given) is not None
    )


def _is_map(given: str) -> bool:
    return given.partition(".")[0] in (*MAPS, *LATER_MAPS)


def _component(given: str) -> str | None:
    """The component of `vae_path` and its like."""
    return next(
        (
            c
            for c in COMPONENTS
            if given.startswith(c + "_") and given.removeprefix(c + "_") in _PER_COMPONENT
        ),
        None,
    )


def _meanings(given: str, value: Any, known: Collection[str]) -> Iterator[tuple[str, str | None, Any]]:
    """What one flag says, as (option, component, value)."""
    if given in ALIASES:
        yield from _meanings(ALIASES[given], value, known)
    elif given in SIZES:
        if read(given, bool, value):
            yield from (("height", None, SIZES[given][0]), ("width", None, SIZES[given][1]))
    elif given == "no_save_output":
        yield "save_output", None, not read(given, bool, value)
    elif given == "output_file_path":
        folder, slash, file = one_text(given, value).rstrip("/").rpartition("/")
        frames = "/" if one_text(given, value).endswith("/") else ""
        yield from (("output_path", None, folder or slash or "."), ("output_file_name", None, file + frames))
    elif given == "prompt_path":
        yield "prompt", None, _lines(one_text(given, value))
    elif _is_map(given):
        name, _, part = given.partition(".")
        yield from [(name, part, value)] if part else ((name, *pair) for pair in _pairs(name, value))
    elif given not in known and (component := _component(given)):
        yield _PER_COMPONENT[given.removeprefix(component + "_")], component, value
    else:
        yield given, None, value


_PER_COMPONENT = {
    "path": "component_paths", "weights_path": "component_weights_paths", "quantization": "component_quantizations",
}  # fmt: skip


def later(name: str, value: Any) -> str | None:
    """The sentence that refuses `name` = `value` where its feature does not exist yet; None where the value
    asks for nothing.
    """
    feature, off = _OFF[name]
    value = of_python(value)
    parts = value.values() if name in LATER_MAPS else [value]
    if all(_plain(_said(part)) in (*off, "") for part in parts):
        return None
    return f"{name}: {shown(_said(value))} cannot be given: {feature} does not exist yet"


def _plain(text: str) -> str:
    """Lower case, and one spelling for each number."""
    with suppress(ValueError):
        return f"{float(text):g}"
    return text.lower()


def _said(value: Any) -> str:
    """A value as the user wrote it, the beginning of a long one."""
    if isinstance(value, Mapping):
        return ",".join(f"{part}={_words_of(inner)}" for part, inner in islice(value.items(), LONGEST))
    return _words_of(value)


def _words_of(value: Any) -> str:
    return " ".join(map(_word, value[:LONGEST])) if isinstance(value, list | tuple) else _word(value)


def _word(value: Any) -> str:
    return value[: LONGEST + 1] if isinstance(value, str) else shown(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_text(name: str, value: Any) -> str:
    """The text of an option that takes one. Raises UserError for none and for several."""
    words = _listed(value)
    if len(words) != 1 or not isinstance(words[0], str):
        raise UserError(
            name, f"{name}: takes one text and was given {'none' if value is True else shown(words)}"
        )
    return words[0]


def _lines(path: str) -> list[str]:
    """The prompts of a text file, one a line."""
    if not path.lower().endswith(".txt"):
        raise UserError("prompt_path", f"prompt_path: {path!r} must be a .txt file with one prompt a line")
    lines = paths.lines(paths.read_text(path, "prompt_path"))
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("prompt_path", f"prompt_path: {path!r} holds no prompt")
    return prompts


def _pairs(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The (component, value) pairs of a map: a mapping, a JSON object, or `a=x,b=y`."""
    if isinstance(value, Mapping):
        yield from ((_word(key), inner) for key, inner in value.items())
        return
    text = ",".join(word if isinstance(word, str) else shown(word) for word in _listed(value))
    if text.lstrip().startswith("{"):
        try:
            yield from json.loads(text).items()
            return
        except (ValueError, RecursionError) as error:
            raise UserError(name, f"{name}: {shown(text)} is not a JSON object") from error
    for pair in text.split(","):
        key, equals, inner = (part.strip() for part in pair.partition("="))
        if not (key and equals and inner):
            raise UserError(
                name, f"{name}: {shown(text)} must be pairs such as transformer=sdpa,text_encoder=math"
            )
        yield key, inner
