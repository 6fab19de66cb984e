"""The options of a generation: frozen records under SGLang Diffusion's names, and the one reader that fills
them.

A command line, a config file and a library call all become a flat dict of names and values and pass through
`options`, so each value is checked once and a mistake reads the same everywhere. None leaves the choice to
the model's row in the registry. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from tinydiff import config_file, flags, paths, unsupported
from tinydiff.records import UserError, shown
from tinydiff.values import Attention, Precision, filled, within

CLOUD_STORAGE = (
    "CLOUD_STORAGE_TYPE", "S3_BUCKET_NAME", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "S3_ENDPOINT_URL", "S3_REGION_NAME",
)  # fmt: skip
"""Variables about object storage, each behind TINYDIFF_ or SGLANG_."""


class Progress(Protocol):
    """Whoever watches a generation."""

    def on_stage(self, name: str) -> None:
        """A stage begins; the one before has ended."""

    def on_step(self, done: int, total: int) -> None:
        """`done` of the stage's `total` steps are made."""


LAST_SEED = 2**63 - 1


def _empty() -> Any:
    return field(default_factory=dict)


@dataclass(frozen=True)
class SamplingOptions:
    """What to make."""

    prompt: tuple[str, ...] = ()
    """What to show; several prompts make several outputs. Or --prompt-path FILE.txt, one prompt a line."""
    negative_prompt: str | None = None
    """What to keep away from, where guidance is above 1."""
    image_path: tuple[str, ...] = ()
    """Images given: the first frame of a video (for some models also the last), the image to start from,
    or references of an edit. A file, an http(s) address or a data URI."""
    mask_path: str | None = None
    """Where the given image is inpainted: white there, black where it stays; of the image's size."""
    strength: float | None = within(above=0, most=1)
    """How far a given image is changed: near 0 hardly, at 1 wholly."""
    seed: tuple[int, ...] = within((42,), least=0, most=LAST_SEED)
    """Start of the random numbers: output k of a prompt is the image of seed + k. Or one seed for each
    output.
    """
    num_outputs_per_prompt: int = within(1, least=1, most=10_000)
    """Outputs made of each prompt."""
    height: int | None = within(least=1, most=2**16)
    """Pixels. Sizes at once: --720p --1080p --2k --4k."""
    width: int | None = within(least=1, most=2**16)
    """Pixels."""
    num_frames: int | None = within(least=1, most=100_000)
    """Frames; 1 makes an image. Qwen-Image-Layered: layers."""
    fps: int | None = within(least=1, most=1000)
    """Frames a second of a clip."""
    num_inference_steps: int | None = within(least=1, most=1000)
    """Denoising steps."""
    guidance_scale: float | None = within(least=0, most=1000)
    """How strongly the prompt is followed; 1 turns guidance off and halves the work."""
    true_cfg_scale: float | None = within(least=0, most=1000)
    """Guidance by a negative prompt, for models whose guidance_scale is told to the network (FLUX.1-dev);
    elsewhere the same as that.
    """
    cfg_normalization: float | None = within(least=0)
    """Z-Image: how many times as long as the prompt's own prediction the guided one may be; 0 does not ask.
    """
    guidance_scale_2: float | None = within(least=0, most=1000)
    """The same for the second expert of a model that has two."""
    boundary_ratio: float | None = within(least=0, most=1)
    """Share of the noise schedule below which the second expert takes over."""
    flow_shift: float | None = within(above=0, most=1000)
    """Above 1 spends more steps at high noise."""
    use_pe: bool | None = None
    """ERNIE-Image: its language model rewrites the prompt first, where the directory has one (component pe);
    false takes it as it is.
    """
    dmd_denoising_steps: tuple[int, ...] = within((), least=0, most=1000)
    """Timesteps of a distilled model, falling."""


@dataclass(frozen=True)
class OutputOptions:
    """Where it goes."""

    output_path: str = "outputs/"
    """Directory of the outputs; "" saves nothing."""
    output_file_name: str | None = None
    """Name whose ending decides the format: .png .jpg .webp for an image, .mp4 .webm .gif or a final / (a
    directory of frames) for a clip. Or directory and name at once: --output-file-path PATH."""
    output_quality: str = "default"
    """Of lossy formats: maximum, high, medium, low or default."""
    output_compression: int | None = within(least=0, most=100)
    """The same as a number, 0 to 100."""
    x264_preset: str | None = None
    """Effort of the MP4 encoder, ultrafast to placebo."""
    save_output: bool = True
    """Write files. --no-save-output does not."""
    return_frames: bool = False
    """Keep the raw frames in the result, for callers from Python."""
    perf_dump_path: str | None = None
    """Write the timings as JSON into this file."""
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    """How much is said; from warning on there is no progress bar."""


@dataclass(frozen=True)
class ModelOptions:
    """What makes it."""

    model_path: str = "tinydiff/shapes"
    """A directory in diffusers layout or a hub id. `tinydiff models` lists what is supported."""
    model_id: str | None = None
    """Take the defaults of this model, whatever the directory is called."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Load the weights saved under this variant, such as fp16, where a component has them."""
    component_paths: Mapping[str, str] = _empty()
    """Take components from elsewhere: --vae-path X, --text-encoder-path X, and so on."""
    dit_precision: Precision | None = None
    """Type of the denoiser's weights."""
    vae_precision: Precision | None = None
    """Type of the autoencoder's weights."""
    text_encoder_precisions: tuple[Precision, ...] = ()
    """Types of the text encoders' weights, in order."""
    image_encoder_precision: Precision | None = None
    """Type of the image encoder's weights."""
    component_precisions: Mapping[str, Precision] = _empty()
    """The same by component: transformer=bf16,vae=fp32."""
    vae_tiling: bool | None = None
    """Decode in tiles, for less memory."""
    attention_backend: Attention = "sdpa"
    """Attention kernel of the denoiser; sdpa lets torch choose."""
    component_attention_backends: Mapping[str, Attention] = _empty()
    """The same by component: transformer=flash,text_encoder=math."""
    enable_torch_compile: bool = False
    """Compile the denoiser: slow once, then faster."""
    backend: Literal["auto", "tinydiff", "sglang"] = "auto"
    """All three are tinydiff's own code."""


@dataclass(frozen=True)
class ParallelOptions:
    """On how many devices. Each rank, a process of its own, has one; where there is no GPU, ranks share the
    CPU.
    """

    num_gpus: int | None = within(least=1, most=2**16)
    """Ranks on all machines. Alone it chooses how they share the work, and says so."""
    tp_size: int | None = within(least=1)
    """Ranks that share the weights of each layer."""
    sp_degree: int | None = within(least=1)
    """Ranks that share the tokens of an image: ulysses_degree times ring_degree, or alone the former."""
    ulysses_degree: int | None = within(least=1)
    """Of them, those that trade tokens for heads in attention."""
    ring_degree: int | None = within(least=1)
    """Of them, those that pass keys and values around."""
    enable_cfg_parallel: bool | None = None
    """Prompt and negative prompt on ranks of their own."""
    cfg_parallel_size: int | None = within(least=1, most=2)
    """The same as a number: 2, or 1 for off."""
    data_parallel_size: int | None = within(least=1)
    """Replicas of the model, which share the outputs."""
    use_fsdp_inference: bool | None = None
    """Divide weights over ranks that would hold the same, and gather them block by block."""
    encoder_parallel: Literal["auto", "fold", "replicate"] = "auto"
    """Text encoders: divided as tp_size says (auto), over all ranks of a replica (fold), or whole on each
    (replicate).
    """
    vae_sp: bool | None = None
    """Divide the autoencoder's rows over the ranks of a replica; so it is done unless false."""
    nnodes: int | None = within(least=1)
    """Machines; each runs the same command, but for node_rank."""
    node_rank: int | None = within(least=0)
    """Which of them this is, from 0."""
    dist_init_addr: str | None = None
    """The first machine's host:port, for all to meet at."""
    master_port: int | None = within(least=1, most=2**16 - 1)
    """The port, where dist_init_addr names none; on one machine any free one."""
    dist_timeout: int | None = within(least=1)
    """Seconds that a rank waits for another before the job ends with an error, 3600 unless told."""


@dataclass(frozen=True)
class Options:
    """Everything that a generation was asked for."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    refusals: tuple[str, ...] = ()
    """One sentence for each option whose feature is not supported yet."""
    ignored: tuple[str, ...] = ()
    """Server options given, which a single generation has no use for."""


GROUPS: tuple[type, ...] = (SamplingOptions, OutputOptions, ModelOptions, ParallelOptions)
NAMES = tuple(entry.name for group in GROUPS for entry in fields(group))


@dataclass(frozen=True)
class Place:
    """Which one this process is of those that torchrun, or `tinydiff generate`, started: its rank of `size`,
    and that on its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def under_torchrun() -> Place | None:
    """This process's place as the environment says it, None where no launcher started it. Raises UserError
    for a variable that no launcher sets so.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {*names, "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    rank, size, local_rank, local_size = (_launched(name) for name in names)
    for name, value, total in (("RANK", rank, size), ("LOCAL_RANK", local_rank, local_size)):
        if not value < total:
            raise UserError(
                name,
                f"the environment variable {name} is {value}; of {total} processes the last is {total - 1}",
            )
    if not 0 < _launched("MASTER_PORT") < 2**16:
        raise UserError("MASTER_PORT", "the environment variable MASTER_PORT must be between 1 and 65535")
    return Place(rank, size, local_rank, local_size)


def _launched(name: str) -> int:
    """A number that a launcher put into the environment."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        message = f"the environment variable {name} is {shown(text)}; a launcher such as torchrun sets it to an integer of at least 0"
        raise UserError(name, f"{message}; unset it where there is none")
    return int(text)


def keys(name: str) -> tuple[str, ...]:
    """The keys in the variable TINYDIFF_<name>, several with commas between."""
    return tuple(word.strip() for word in os.environ.get(f"TINYDIFF_{name}", "").split(",") if word.strip())


def cloud_storage() -> dict[str, str]:
    """What the environment says of object storage, by SGLang's names without their first word, such as
    S3_BUCKET_NAME: the variable TINYDIFF_S3_BUCKET_NAME, else SGLANG_S3_BUCKET_NAME. What is not set, or is
    empty, is left out."""
    found = {
        name: os.environ.get(f"TINYDIFF_{name}") or os.environ.get(f"SGLANG_{name}") for name in CLOUD_STORAGE
    }
    return {name: value for name, value in found.items() if value}


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line, `--config FILE` read first and overruled by what is beside it. Raises
    UserError.
    """
    given = flags.collect(flags.tokens(argv), [*NAMES, "config"], dashes=True)
    config = given.pop("config", None)
    entries = (
        {}
        if config is None
        else flags.collect(config_file.entries_of(flags.one_text("config", config)), NAMES)
    )
    for name, value in given.items():
        entries[name] = entries.get(name, {}) | value if name in (*flags.MAPS, *unsupported.MAPS) else value
    return _checked(entries)


def options(entries: Mapping[str, Any]) -> Options:
    """The options under these names, spelled as on the command line or as keys. Raises UserError naming what
    is wrong.
    """
    return _checked(flags.collect(entries.items(), NAMES))


def seeds(sampling: SamplingOptions, prompt: int) -> tuple[int, ...]:
    """The seeds of the outputs of prompt number `prompt`, in order. Raises UserError where they would go past
    the last seed.
    """
    count, given = sampling.num_outputs_per_prompt, sampling.seed
    if len(given) == 1:
        if given[0] + count - 1 > LAST_SEED:
            raise UserError(
                "seed",
                f"seed: {given[0]} and {count} outputs go past the last seed; give at most {LAST_SEED - count + 1}",
            )
        return tuple(given[0] + k for k in range(count))
    return given if len(given) == count else given[prompt * count : (prompt + 1) * count]


def _checked(entries: Mapping[str, Any]) -> Options:
    records = [filled(group, entries) for group in GROUPS]
    rest = {name: value for name, value in entries.items() if name not in NAMES}
    refused = [flags.refusal(name, value) for name, value in rest.items() if name not in flags.SERVER]
    made = Options(
        *records,
        refusals=tuple(filter(None, refused)),
        ignored=tuple(name for name in rest if name in flags.SERVER),
    )
    if made.output.output_path == "":
        made = replace(made, output=replace(made.output, save_output=False))
    _agree(made)
    return made


def _agree(made: Options) -> None:
    """What no single option can tell."""
    sampling, output = made.sampling, made.output
    prompts, count, given = len(sampling.prompt), sampling.num_outputs_per_prompt, len(sampling.seed)
    if given not in (1, count, count * max(prompts, 1)):
        wanted = " or ".join(str(number) for number in sorted({1, count, count * max(prompts, 1)}))
        raise UserError("seed", f"seed: {given} are given for {count} outputs of each prompt; give {wanted}")
    seeds(sampling, 0)
    if prompts > 1 and output.output_file_name is not None:
        message = f"output_file_name: {shown(output.output_file_name)} names the output of one prompt and {prompts} are given; leave it out"
        raise UserError("output_file_name", message)
    for path in sampling.image_path:
        if not paths.scheme(path) and paths.kind(paths.path(path, "image_path")) != "file":
            raise UserError("image_path", f"image_path: {shown(path)} is not a file")
