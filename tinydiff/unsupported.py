"""Features of SGLang Diffusion that are not supported yet: one table for flags, requests, help and routes.

No torch here. Whoever adds a feature deletes its lines, and help and errors follow.
"""

from __future__ import annotations

FLAGS = """\
HSDP, KV gathering and tiles shared by several GPUs
    kv_gather_degree=1 hsdp_replicate_dim=1 hsdp_shard_dim=1 enable_nccl_nvls=false
    enable_sequence_shard=false vae_config.use_parallel_tiling=true|false
    vae_config.use_parallel_decode=true|false vae_config.parallel_decode_mode=auto
    diffusion_decoder_parallel_tiling=true|false
choosing GPUs or a NUMA node by number
    base_gpu_id=0 gpu_ids=0 numa_node=0
quantisation to 4 bits and of caches
    component_quantization_ignored_layers= enable_svdquant=false quantization_precision=
    quantization_rank= quantization_act_unsigned=false dit_config.quant_config= kv_cache_quant=off
    kv_cache_quant_centroids= kv_cache_quant_block_size= kv_cache_quant_stages= kv_cache_quant_iters=
    kv_cache_quant_asymmetric=false kv_cache_quant_keep_recent= kv_cache_quant_sink=
    kv_cache_quant_sink_keep=
component weights in files of their own
    direct_gpu_weight_loading=false component_direct_gpu_weight_loading=false
    dit_config.prefix= vae_config.load_encoder=true vae_config.load_decoder=true
how long resident layers stay, and what offload does while compiling
    layerwise_residency_lifetime= dit_layerwise_residency_lifetime=forward|permanent
    offload_during_compile=true|false ltx2_two_stage_device_mode=
step caches but DBCache (see enable_cache_dit)
    enable_teacache=false cfg_gate_step=1
    enable_spectrum=false w= taylor_order= history_size= spectrum_window_size= spectrum_flex_window=
    spectrum_warmup_steps= spectrum_m= spectrum_lam= spectrum_tau_num_steps=
settings of sparse attention
    attention_backend_config= mask_strategy_file_path= moba_config_path=
an attention backend per request
    attention_backend_override=
regional compilation and partial CUDA graphs
    regional_compile=false enable_breakable_cuda_graph=false bcg_text_buckets=
    dit_config.torch_compile_mode=
other numerics than the defaults
    allow_cudnn_tf32=true allow_bf16_reduced_precision_reduction=true disable_autocast=true
    quality=lossless vae_decode_precision=
tiles in time
    vae_config.tile_sample_min_num_frames=16 vae_config.tile_sample_stride_num_frames=12
    vae_config.blend_num_frames= vae_config.use_temporal_tiling=false diffusion_decoder_tiling=true|false
another pipeline or scheduler than the checkpoint's
    pipeline_config_path= model_subfolder= model_variant= scheduler_class_override=
    task_type= data_type= no_override_protected_fields=false text_encoder_configs=
guidance renormalisation
    enable_cfg_renorm=false cfg_renorm_min= embedded_cfg_scale=6
noise drawn on the GPU
    generator_device=cpu
rounding the number of frames
    adjust_frames=true|false num_frames_round_down=false
returning the latents of every step
    return_trajectory_latents=false return_trajectory_decoded=false return_file_paths_only=true|false
progressive resolution
    progressive_mode=fullres progressive_levels=1 progressive_delta=0.01
profiling
    profile=false num_profiled_timesteps=5 profile_all_stages=false enable_layerwise_nvtx_marker=false
    debug=false enable_trace=false otlp_traces_endpoint= otlp_service_name=
warm-up by a request
    warmup_mode=off|server
prompt rewriting by another model
    pe_server_url= prompt_enhancer_config= enable_prompt_rewrite=false srt_encoder_url=
    srt_encoder_connection_timeout=3.05 srt_encoder_timeout=100
video input
    video_path=
a video of poses
    pose_video_path=
sound of a given length
    sound_duration=0
reinforcement learning rollouts
    rollout=false rollout_sde_type=sde rollout_noise_level=0.7 rollout_log_prob_no_const=false
    rollout_debug_mode=false
options of other model families
    minimax_h3_adaln_online=false minimax_h3_adaln_plan_width=4 minimax_h3_adaln_host_cache_gb=8
    minimax_h3_adaln_cache_path= load_diffusion_decoder=false use_diffusion_decoder=false
    resolution= streaming=false refiner_chunked=false num_frame_per_block= realtime_causal_sink_size=
    realtime_causal_kv_cache_num_frames= action= translation_speed= rotation_speed_deg= pitch_limit_deg=
    sr_resolution_scale= sr_num_steps= sr_tiles_batch_size= sr_tile_min_overlap= sr_target_resolution=
    sr_target_resize_mode= action_mode= domain_id= domain_name= raw_action_dim= action_fps= bot_task=
    system_prompt= max_sequence_length= flux3_alpha= flux3_compile_text_encoder=false
    flux3_text_encoder_fp8=false flux3_keep_visual_vae_resident=false flux3_dit_keep_non_layer=false
    flux3_skip_empty_cache_after_request=false
"""
"""Each feature with its options below it. `name=a|b` accepts a and b, which turn the feature off; `name=`
accepts no value.
"""

MAPS = (
    "component_quantization_ignored_layers",
    "component_direct_gpu_weight_loading",
)
"""Options of `FLAGS` that hold one value for each component."""

ATTENTION = """
    fa3 fa4 dynamic_cudnn_sdpa sage_attn sage_attn_3 fp8_fa_sm120 sliding_tile_attn video_sparse_attn
    video_sparse_attn_h3 hybrid_window_attn_h3 sparse_video_gen_2_attn vmoba_attn sparge_attn sla_attn
    sage_sla_attn sol_attn subblock_sparse_attn cube_sparse_attn aiter aiter_sage laser_attn
    block_sparse_attn rain_fusion_attn no_attention xpu mps
"""

QUANTIZATION = """
    auto-round modelopt modelopt_fp8 modelopt_fp4 bitsandbytes modelslim mxfp8 mxfp4 mxfp4_npu convrot_int8
"""

CHOICES: dict[str, tuple[str, ...]] = {
    "attention_backend": tuple(ATTENTION.split()),
    "component_attention_backends": tuple(ATTENTION.split()),
    "encoder_parallel": ("dp",),
    "quantization": tuple(QUANTIZATION.split()),
    "component_quantizations": tuple(QUANTIZATION.split()),
}
"""Option -> SGLang's values of it."""


def sentence(feature: str) -> str:
    """How every message says that a feature is missing."""
    return f"not supported yet: {feature}"


def _read(table: str) -> dict[str, tuple[str, list[str]]]:
    options, feature = {}, ""
    for line in table.splitlines():
        if not line.startswith(" "):
            feature = line
            continue
        for option in line.split():
            name, _, values = option.partition("=")
            options[name] = feature, values.split("|") if values else []
    return options


OPTIONS = _read(FLAGS)
"""Option -> its feature and the values that turn it off."""

FEATURES = tuple(dict.fromkeys(feature for feature, _ in OPTIONS.values()))
