"""tinydiff: images and video from diffusion models, as pure functions over safetensors weights.

`load` brings a model into memory, `generate` makes images and videos with it. Importing this package imports
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinydiff.version import __version__

if TYPE_CHECKING:
    from tinydiff.config import Progress
    from tinydiff.records import Result
    from tinydiff.runtime.blueprint import Model

__all__ = ["__version__", "generate", "load"]


def load(model_path: str | None = None, **options: Any) -> Model:
    """Load a model: a directory in diffusers layout, a hub id, or the small model of the package.

    options: the command line's model options by their names, such as `dit_precision="bf16"`,
    `attention_backend="flash"` or `enable_torch_compile=True`; under torchrun also those of ranks, such as
    `tp_size=2`. Raises `tinydiff.records.UserError` naming the option that is wrong.
    """
    from tinydiff.runtime import library

    return library.load(model_path, options)


def generate(model: Model, prompt: str, *, progress: Progress | None = None, **fields: object) -> Result:
    """Make images or a video from a prompt.

    progress: told of each stage and step, an object with `on_stage(name)` and `on_step(done, total)`. fields:
    the command line's sampling options by their names, such as `height=480`, `num_frames=17`, `seed=3`,
    `image_path="a.png"` or `num_outputs_per_prompt=4`.
    Returns a `Result`: `frames` (uint8 [frames, height, width, 3] per output), `images` (the first frame of
    each), `latents`, `parameters` and timings. Raises `tinydiff.records.UserError` naming the field that is
    wrong.
    """
    from tinydiff.runtime import library

    return library.generate(model, prompt, fields, progress)
