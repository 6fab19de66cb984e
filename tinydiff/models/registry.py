"""What is released: one literal row per model, its name, what tells it apart and the numbers it is used with. No torch here.

Defaults come from the model cards (steps, guidance, shift, sizes) and each repository's `model_index.json` (class, boundary).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tinydiff.records import UserError, nearest

WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The negative prompt that Wan was tuned with, in the language that it was tuned in."""


@dataclass(frozen=True)
class ReleasedModel:
    """A released model: the defaults of a request, and what a folder of unknown name is recognised by.

    height, width: pixels, multiples of `size_multiple`. num_frames: k * `frame_multiple` + 1. clip_frames: the frames of a clip that was
    asked for without a number, where `num_frames` makes a picture. steps, guidance (1 runs the network once a step), guidance_2 (of the
    second expert), boundary_ratio (the share of the schedule below which the second expert runs), flow_shift: the sampling table.
    solver: a name of the engine; dmd_timesteps belong to "dmd". negative_prompt: None where guidance would not read one.
    image: whether a first frame is taken. params: of the transformers together. layers, heads, in_channels: of `transformer/config.json`.
    """

    name: str
    pipeline: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance: float
    flow_shift: float
    params: int
    layers: int
    heads: int
    in_channels: int
    guidance_2: float | None = None
    boundary_ratio: float | None = None
    solver: Literal["unipc", "dmd", "euler"] = "unipc"
    dmd_timesteps: tuple[int, ...] = ()
    negative_prompt: str | None = WAN_NEGATIVE
    text_tokens: int = 512
    size_multiple: int = 16
    frame_multiple: int = 4
    image: Literal["none", "optional", "required"] = "none"
    expand_timesteps: bool = False
    clips_by_name: int | None = None
    family: str = "wan"

    @property
    def experts(self) -> int:
        return 1 if self.boundary_ratio is None else 2

    @property
    def clip_frames(self) -> int:
        return self.clips_by_name or self.num_frames


SHIPPED = "tinydiff/shapes"
"""The model in the package, used where no model is named."""

DMD = (1000, 757, 522)

MODELS: tuple[ReleasedModel, ...] = (
    ReleasedModel(
        SHIPPED, "WanPipeline", 128, 128, 1, 8, steps=30, guidance=2.5, flow_shift=4.0, params=2_477_728, layers=6, heads=5,
        in_channels=32, negative_prompt=None, text_tokens=32, size_multiple=32, image="optional", expand_timesteps=True, clips_by_name=17,
    ),
    ReleasedModel(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", 480, 832, 81, 16, steps=50, guidance=3.0, flow_shift=3.0,
        params=1_418_996_800, layers=30, heads=12, in_channels=16,
    ),
    ReleasedModel(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline", 720, 1280, 81, 16, steps=50, guidance=5.0, flow_shift=5.0,
        params=14_288_491_584, layers=40, heads=40, in_channels=16,
    ),
    ReleasedModel(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "WanImageToVideoPipeline", 480, 832, 81, 16, steps=50, guidance=5.0, flow_shift=3.0,
        params=16_394_878_784, layers=40, heads=40, in_channels=36, image="required",
    ),
    ReleasedModel(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "WanImageToVideoPipeline", 720, 1280, 81, 16, steps=50, guidance=5.0, flow_shift=5.0,
        params=16_394_878_784, layers=40, heads=40, in_channels=36, image="required",
    ),
    ReleasedModel(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "WanPipeline", 720, 1280, 81, 16, steps=40, guidance=4.0, guidance_2=3.0,
        boundary_ratio=0.875, flow_shift=12.0, params=28_576_983_168, layers=40, heads=40, in_channels=16,
    ),
    ReleasedModel(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "WanImageToVideoPipeline", 720, 1280, 81, 16, steps=40, guidance=3.5, guidance_2=3.5,
        boundary_ratio=0.9, flow_shift=5.0, params=28_577_802_368, layers=40, heads=40, in_channels=36, image="required",
    ),
    ReleasedModel(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "WanPipeline", 704, 1280, 121, 24, steps=50, guidance=5.0, flow_shift=5.0,
        params=4_999_787_712, layers=30, heads=24, in_channels=48, size_multiple=32, image="optional", expand_timesteps=True,
    ),
    ReleasedModel(
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "WanDMDPipeline", 480, 832, 61, 16, steps=3, guidance=1.0, flow_shift=8.0,
        solver="dmd", dmd_timesteps=DMD, negative_prompt=None, params=1_418_996_800, layers=30, heads=12, in_channels=16,
    ),
    ReleasedModel(
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "WanDMDPipeline", 704, 1280, 121, 24, steps=3, guidance=1.0, flow_shift=5.0,
        solver="dmd", dmd_timesteps=DMD, negative_prompt=None, params=4_999_787_712, layers=30, heads=24, in_channels=48, size_multiple=32,
        image="optional", expand_timesteps=True,
    ),
)  # fmt: skip


def find(name: str) -> ReleasedModel | None:
    """The row named `name`: a hub id, its last part, or a folder whose last part it is; None if there is none."""
    tail = name.rstrip("/").rsplit("/", 1)[-1]
    return next((row for row in MODELS if name == row.name or tail == row.name.rsplit("/", 1)[-1]), None)


def named(model_id: str) -> ReleasedModel:
    """The row that --model-id names. Raises UserError with the nearest name."""
    row = find(model_id)
    if row is None:
        hint = nearest(model_id, [row.name for row in MODELS])
        raise UserError("model_id", f"model_id: {model_id!r} is not a known model (`tinydiff models` lists them){hint}")
    return row


def match(class_name: str, options: Mapping[str, Any], transformer: Mapping[str, Any], name: str) -> ReleasedModel:
    """The row whose defaults a folder takes: by its name, else by its kind and the transformer's shape, else the first of its kind.

    class_name, options: of `model_index.json`. transformer: `transformer/config.json`. Two released models of one shape (I2V 480P and
    720P) cannot be told apart without a name; the first is taken, and --model-id chooses. Raises UserError for an unsupported class.
    """
    row = find(name)
    if row is not None and row.pipeline == class_name:
        return row
    classes = sorted({row.pipeline for row in MODELS})
    if class_name not in classes:
        hint = nearest(class_name, classes)
        raise UserError("model_path", f"model_path: {name!r} is a {class_name}; supported classes are {', '.join(classes)}{hint}")
    kind = (class_name, 1 if options.get("boundary_ratio") is None else 2, bool(options.get("expand_timesteps")))
    rows = [row for row in MODELS[1:] if (row.pipeline, row.experts, row.expand_timesteps) == kind]
    if not rows:
        extra = f"boundary_ratio {options.get('boundary_ratio')} and expand_timesteps {kind[2]}"
        raise UserError("model_path", f"model_path: {name!r} is a {class_name} with {extra}, a combination that no supported model has")
    shape = (transformer.get("num_layers"), transformer.get("num_attention_heads"), transformer.get("in_channels"))
    return next((row for row in rows if (row.layers, row.heads, row.in_channels) == shape), rows[0])
