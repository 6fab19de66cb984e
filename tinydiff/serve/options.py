"""The server's own options, under SGLang Diffusion's names where it has them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tinydiff.config import ModelOptions, OutputOptions, ParallelOptions
from tinydiff.values import LogLevel, same, within

if TYPE_CHECKING:
    from tinydiff.models.registry import ReleasedModel
    from tinydiff.serve.jobs import Kind

DEFAULT_SIZES = 4
"""Default of --max-pixels, as a multiple of the pixels of the model's default output."""


@dataclass(frozen=True)
class ServeOptions:
    """How the model is served."""

    host: str = "127.0.0.1"
    """Host name or IP address to listen on; 0.0.0.0 listens on every network of this machine."""
    port: int = within(30000, least=0, most=2**16 - 1)
    """Port to listen on; 0 chooses any free port."""
    strict_ports: bool = False
    """End with an error if the port is taken, instead of using the next free port."""
    served_model_name: str | None = None
    """Name of the model in the API. Default: the model's own name."""
    models: tuple[str, ...] = ()
    """Several models behind one server, in place of --model-path: hub ids or directories, each alone or as
    NAME=MODEL. A request names one in its field `model`; without, the first one runs it. The model that was
    used least recently leaves the GPU where not all fit.
    """
    api_key: tuple[str, ...] = ()
    """API keys that clients send as `Authorization: Bearer KEY`. The environment variable TINYDIFF_API_KEY
    may hold more, separated by commas.
    """
    api_key_file: str | None = None
    """File with API keys, one per line."""
    admin_api_key: str | None = None
    """API key for requests that change the server (sleep, wake). Or set the environment variable
    TINYDIFF_ADMIN_API_KEY.
    """
    cors_origin: tuple[str, ...] = ()
    """Origins of web pages whose scripts may call the API; * allows any."""
    public_url: str | None = None
    """URL at which clients reach this server, used for URLs in answers. Default: the URL of the request."""
    state_dir: str = "tinydiff-state/"
    """Directory of the job database and, without output_path, of the files of jobs."""
    output_path: str | None = None
    """Directory of the input and output files of jobs. Default: `files` in state_dir."""
    state_url: str | None = None
    """Database for jobs that several servers share, as postgresql://... All of them then use the same
    state_dir.
    """
    unfinished: Literal["rerun", "fail"] = "rerun"
    """What happens to jobs that were running when a server ended."""
    lease: float = within(30.0, above=0, most=3600)
    """Seconds until other servers take over the jobs of a server that does not respond."""
    output_lifetime: float = within(86400.0, above=0, most=1e10)
    """Seconds that outputs are kept."""
    output_limit: float = within(10.0, above=0, most=1e9)
    """GB of outputs that are kept; the oldest are deleted first."""
    max_queue: int = within(64, least=1, most=100_000)
    """Number of jobs that may wait; further requests get status 429 and when to try again. With several API
    keys, one key may have no more jobs waiting than there are free places.
    """
    max_outputs: int = within(10, least=1, most=10_000)
    """Number of outputs that one request may ask for."""
    max_body: float = within(64.0, above=0, most=4096)
    """Size limit of a request, in MB."""
    max_input_pixels: float = within(40e6, least=1)
    """Number of pixels that an input image may have."""
    max_pixels: float | None = within(None, least=1)
    """Number of pixels that one output may have: frames times height times width. Default: 4 times the pixels
    of the model's default output.
    """
    lora_dir: str | None = None
    """Directory of LoRA adapters that requests may use; FILE.safetensors is the adapter FILE."""
    allow_url_inputs: bool = False
    """Download input images from public URLs that requests contain."""
    batching_max_size: int = within(8, least=1, most=1024)
    """Number of images that may share the denoising loop. Fewer share it where measured step times say that
    is faster.
    """
    batching_delay_ms: float = within(0.0, least=0, most=60_000)
    """Milliseconds that an idle server waits for further requests before it starts the first."""
    warmup_resolutions: tuple[str, ...] = ()
    """Sizes, as WIDTHxHEIGHT, that are generated once before the server is ready. Default: the model's
    default size.
    """
    warmup_num_frames: int | None = within(None, least=1)
    """Number of frames of the warm-up generations."""
    warmup_steps: int = within(1, least=0, most=1000)
    """Denoising steps of the warm-up generations; 0 skips the warm-up."""
    idle_unload: float | None = within(None, above=0)
    """Seconds without a request after which the weights are unloaded. The next request loads them again."""
    unload_to: Literal["host", "nothing"] = "host"
    """Where weights of a GPU go when they are unloaded: to the host's memory, if it has room, or to nothing.
    From nothing they come back by being read from their files again.
    """
    http_threads: int = within(128, least=2, most=4096)
    """Number of requests that are answered at once, including those that wait for an image."""
    http_graceful_shutdown_timeout: float = within(30.0, least=0)
    """Seconds that running jobs get to finish when the server stops; unfinished jobs are queued again."""
    enable_metrics: bool = True
    """Serve Prometheus metrics at /metrics."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log, which has one line per request."""

    def pixel_limit(self, row: ReleasedModel, kind: Kind) -> int:
        """Number of pixels that one output may have, over all its frames or layers."""
        frames = row.video_frames if kind == "video" else max(1, row.layers)
        return int(self.max_pixels or DEFAULT_SIZES * frames * row.height * row.width)

    @property
    def several_keys(self) -> bool:
        """Whether several API keys share the queue."""
        return bool(self.api_key) and len({*self.api_key, self.admin_api_key} - {None}) > 1


@dataclass(frozen=True)
class Serve:
    """All options of `tinydiff serve`."""

    server: ServeOptions = field(default_factory=ServeOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    log_level: LogLevel = same(OutputOptions, "log_level")  # noqa: RUF009
