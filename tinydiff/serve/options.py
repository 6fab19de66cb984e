"""The server's own options, under SGLang Diffusion's names where it has them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tinydiff.config import ModelOptions, OutputOptions
from tinydiff.values import same, within

if TYPE_CHECKING:
    from tinydiff.models.registry import ReleasedModel
    from tinydiff.serve.jobs import Kind

DEFAULT_SIZES = 4
"""Without --max-pixels an output may have this many times the pixels of the model's default output."""


@dataclass(frozen=True)
class ServeOptions:
    """How the model is served."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every network of this machine."""
    port: int = within(30000, least=0, most=2**16 - 1)
    """0 takes any free one."""
    strict_ports: bool = False
    """End with an error where the port is taken, instead of taking the next free one."""
    served_model_name: str | None = None
    """What clients call the model."""
    api_key: tuple[str, ...] = ()
    """Keys that clients show as `Authorization: Bearer KEY`. Also the variable TINYDIFF_API_KEY, several with
    commas between.
    """
    api_key_file: str | None = None
    """A file of such keys, one a line."""
    admin_api_key: str | None = None
    """The key for what changes the server (sleep, wake). Also the variable TINYDIFF_ADMIN_API_KEY."""
    cors_origin: tuple[str, ...] = ()
    """Origins of other pages whose scripts may call; * is any."""
    public_url: str | None = None
    """What clients reach this server as, for the addresses in answers; else what their request says."""
    state_dir: str = "tinydiff-state/"
    """Directory of the jobs and, without output_path, their files."""
    output_path: str | None = None
    """Directory of the files that jobs were given and made. Default: `files` in state_dir."""
    state_url: str | None = None
    """postgresql://... keeps the jobs in a database that several servers share; their state_dir is then one
    shared directory.
    """
    unfinished: Literal["rerun", "fail"] = "rerun"
    """What becomes of jobs that a server left unfinished."""
    lease: float = within(30.0, above=0, most=3600)
    """Seconds after which the jobs of a server that no longer answers are taken by others."""
    output_lifetime: float = within(86400.0, above=0, most=1e10)
    """Seconds that outputs are kept."""
    output_limit: float = within(10.0, above=0, most=1e9)
    """GB of outputs kept; the oldest go first."""
    max_queue: int = within(64, least=1, most=100_000)
    """Jobs waiting at most; more are told to come back. A server of several keys also tells a key that has as
    many waiting as places are left."""
    max_outputs: int = within(10, least=1, most=10_000)
    """Outputs of one request at most."""
    max_body: float = within(64.0, above=0, most=4096)
    """MB of a request at most."""
    max_input_pixels: float = within(40e6, least=1)
    """Pixels of a given image at most."""
    max_pixels: float | None = within(None, least=1)
    """Pixels of one output at most, frames times height times width. Default: 4 times those of the model's
    own default output.
    """
    lora_dir: str | None = None
    """Directory of LoRA adapters that requests may name: FILE.safetensors is the adapter FILE."""
    allow_url_inputs: bool = False
    """Fetch images from public addresses that requests name."""
    batching_max_size: int = within(8, least=1, most=1024)
    """Images that share the denoising loop at most; fewer where that is measured to be faster."""
    batching_delay_ms: float = within(0.0, least=0, most=60_000)
    """How long an idle server waits for more requests before it begins."""
    warmup_resolutions: tuple[str, ...] = ()
    """WIDTHxHEIGHT sizes made once before the server is ready; none: the model's own size."""
    warmup_num_frames: int | None = within(None, least=1)
    """Frames of those."""
    warmup_steps: int = within(1, least=0, most=1000)
    """Denoising steps of those; 0 does not warm up."""
    idle_unload: float | None = within(None, above=0)
    """Seconds without a request after which the model leaves the device, to come back with the next."""
    http_threads: int = within(128, least=2, most=4096)
    """Requests answered at once; those that wait for an image count."""
    http_graceful_shutdown_timeout: float = within(30.0, least=0)
    """Seconds that running jobs get when the server is told to stop; what is left is queued again."""
    enable_metrics: bool = True
    """Answer /metrics."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log, one line a request."""

    def pixel_limit(self, row: ReleasedModel, kind: Kind) -> int:
        """Pixels that one output may have, all its frames or layers together."""
        frames = row.video_frames if kind == "video" else max(1, row.layers)
        return int(self.max_pixels or DEFAULT_SIZES * frames * row.height * row.width)

    @property
    def several_keys(self) -> bool:
        """Whether different keys share the queue."""
        return bool(self.api_key) and len({*self.api_key, self.admin_api_key} - {None}) > 1


@dataclass(frozen=True)
class Serve:
    """All options of `tinydiff serve`."""

    server: ServeOptions = field(default_factory=ServeOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    log_level: Literal["debug", "info", "warning", "error", "critical"] = same(OutputOptions, "log_level")
