"""The released models: one row each, with its name, how it is recognised and its defaults. No torch.

Defaults come from the model cards (steps, guidance, shift, sizes) and each repository's `model_index.json`
(class, boundary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinydiff.entries import Entries, EntryDict
from tinydiff.records import GuidanceTerms, UserError, nearest

WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The negative prompt of Wan's model cards."""
S2V_NEGATIVE = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan's speech to video, from its published config."""


Kind = tuple[str, int, bool, bool]
"""A model_index.json's class, number of experts, expand_timesteps and is_distilled."""


@dataclass(frozen=True)
class ReleasedModel:
    """A released model: the defaults of a request, and how a model directory is recognised.

    height, width: pixels, multiples of `size_multiple`. num_frames: k * `frame_multiple` + 1, of segments
    without the 1. video_frames:
    the frames of a video where num_frames, the default, gives an image.
    steps, guidance, guidance_2 (of the second expert), boundary_ratio (the part of the schedule in which the
    second expert runs), flow_shift (None: that of the directory's scheduler), stored_shift (that of the
    released scheduler): the sampling table. With guidance 1 the network runs once a step.
    guidance_form: "scale" is a CFG scale; "offset" is the model card's scale, to which 1 is added for CFG;
    "embedded" is an input of the network (guidance-distilled). With "embedded" and "true", CFG has a scale of
    its own, true_cfg_scale, and runs where a negative prompt is given.
    solver: a name of the engine; dmd_timesteps belong to "dmd". sigmas: those that a distilled model is made
    for, as many as its steps. refine_sigmas: those of a second stage, which an upsampler begins. sound:
    whether an output has sound. speech: whether a video is made to a given sound, in segments of num_frames.
    terms: those of guidance beside `guidance`, None where the model knows none. negative_prompt: None where
    guidance reads none. text_tokens: most tokens of a
    prompt.
    images: least and most input images. image_use: as frames of the video, as the image to start from, or as
    references. reference_multiple: the output's size follows the last input image, rounded to multiples of
    this many pixels; None: it follows the first one, rounded down. layers: the number of images with alpha
    that an input image is decomposed into. captions: whether the text encoder writes a missing prompt.
    params: of all transformers. shape: entries of `transformer/config.json` that tell the model apart.
    """

    name: str
    family: str
    pipeline: str
    height: int
    width: int
    steps: int
    guidance: float
    params: int
    shape: Entries
    num_frames: int = 1
    fps: int = 16
    flow_shift: float | None = None
    stored_shift: float | None = None
    guidance_2: float | None = None
    guidance_form: Literal["scale", "embedded", "offset", "true"] = "scale"
    boundary_ratio: float | None = None
    solver: Literal["unipc", "dmd", "euler"] = "euler"
    dmd_timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    refine_sigmas: tuple[float, ...] = ()
    sound: bool = False
    speech: bool = False
    terms: GuidanceTerms | None = None
    negative_prompt: str | None = ""
    text_tokens: int = 512
    size_multiple: int = 16
    frame_multiple: int = 4
    layers: int = 0
    captions: bool = False
    images: tuple[int, int] = (0, 0)
    image_use: Literal["frames", "start", "references"] = "frames"
    reference_multiple: int | None = None
    expand_timesteps: bool = False
    default_video_frames: int | None = None

    @property
    def experts(self) -> int:
        return 1 if self.boundary_ratio is None else 2

    @property
    def kind(self) -> Kind:
        return self.pipeline, self.experts, self.expand_timesteps, self.shape.get("is_distilled", False)

    @property
    def video_frames(self) -> int:
        return self.default_video_frames or self.num_frames


SHIPPED = "tinydiff/shapes"
"""The model in the package, used where no model is named."""

DMD = (1000, 757, 522)

T2V, I2V, DMD_PIPELINE = "WanPipeline", "WanImageToVideoPipeline", "WanDMDPipeline"


def _wan(
    name: str,
    pipeline: str,
    size: tuple[int, int],
    frames: int,
    fps: int,
    steps: int,
    guidance: float,
    shift: float,
    params: int,
    shape: tuple[int, int, int],
    **more: object,
) -> ReleasedModel:
    """A Wan model. shape: its layers, heads and input channels."""
    names = ("num_layers", "num_attention_heads", "in_channels")
    entries = {**dict(zip(names, shape, strict=True))}
    fields: EntryDict = {"num_frames": frames, "fps": fps, "flow_shift": shift, "stored_shift": shift}
    fields |= {"solver": "unipc", "negative_prompt": WAN_NEGATIVE} | more
    return ReleasedModel(name, "wan", pipeline, *size, steps, guidance, params, entries, **fields)


_480P, _720P, _704P = (480, 832), (720, 1280), (704, 1280)
_TI2V: EntryDict = {"size_multiple": 32, "images": (0, 1), "expand_timesteps": True}
_DISTILLED: EntryDict = {"solver": "dmd", "dmd_timesteps": DMD, "negative_prompt": None}

_START: EntryDict = {"images": (0, 1), "image_use": "start"}
"""A text-to-image model can also start from an input image."""

QWEN_2512_NEGATIVE = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)
"""The negative prompt on Qwen-Image-2512's card."""
_QWEN: EntryDict = {"params": 20_430_401_088, "negative_prompt": " "}
_QWEN_2512: EntryDict = {**_QWEN, "negative_prompt": QWEN_2512_NEGATIVE}
_QWEN_EDIT: EntryDict = {**_QWEN, "images": (1, 1), "image_use": "references", "reference_multiple": 32}
_QWEN_EDIT_PLUS: EntryDict = {**_QWEN_EDIT, "images": (1, 3)}
_QWEN_LAYERED: EntryDict = {**_QWEN_EDIT, "params": 20_430_407_232}


def _klein(name: str, distilled: bool, params: int, shape: tuple[int, int, int]) -> ReleasedModel:
    """A FLUX.2 klein. shape: its double blocks, single blocks and heads."""
    names = ("num_layers", "num_single_layers", "num_attention_heads")
    entries = {**dict(zip(names, shape, strict=True)), "is_distilled": distilled}
    steps, guidance, negative = (4, 1.0, None) if distilled else (50, 4.0, "")
    fields: EntryDict = {"negative_prompt": negative, **_FLUX2}
    pipeline, name = "Flux2KleinPipeline", f"black-forest-labs/FLUX.2-klein-{name}"
    return ReleasedModel(name, "flux2", pipeline, 1024, 1024, steps, guidance, params, entries, **fields)


_FLUX2: EntryDict = {"images": (0, 10), "image_use": "references"}
_ERNIE: EntryDict = {
    "params": 8_033_490_048,
    "shape": {"num_layers": 36, "hidden_size": 4096},
    "text_tokens": 2048,
}

_HUNYUAN: EntryDict = {
    "params": 12_821_012_544,
    "num_frames": 129,
    "fps": 24,
    "guidance_form": "embedded",
    "text_tokens": 256,
}


_HUNYUAN15 = {
    "t2v": ("HunyuanVideo15Pipeline", (0, 0)),
    "i2v": ("HunyuanVideo15ImageToVideoPipeline", (1, 1)),
}
"""Task of a HunyuanVideo-1.5 -> its pipeline, and least and most input images."""


def _hunyuan15(
    resolution: str, task: str, shift: float, kind: str = "", steps: int = 50, params: int = 8_326_608_160
) -> ReleasedModel:
    """A HunyuanVideo-1.5. kind: how it was distilled; step-distilled models know where a step ends."""
    name = "_".join(part for part in (resolution, task, kind) if part)
    size, target = {"480p": ((480, 848), 640), "720p": (_720P, 960)}[resolution]
    meanflow = kind == "step_distilled"
    shape = {"num_layers": 54, "target_size": target, "task_type": task, "use_meanflow": meanflow}
    guidance, negative = (1.0, None) if kind else (6.0, "")
    pipeline, images = _HUNYUAN15[task]
    return ReleasedModel(
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}", "hunyuan_video15", pipeline, *size,
        steps, guidance, params, shape, num_frames=121, fps=24, stored_shift=shift, negative_prompt=negative,
        text_tokens=1000, images=images,
    )  # fmt: skip


_LTX2: EntryDict = {
    "num_frames": 121, "fps": 24, "text_tokens": 1024, "size_multiple": 32, "frame_multiple": 8,
    "images": (0, 16), "refine_sigmas": (0.909375, 0.725, 0.421875), "sound": True,
}  # fmt: skip


def _ltx2(name: str, params: int, gated: bool) -> ReleasedModel:
    """An LTX-2. gated: whether attention has gates, which tell LTX-2.3."""
    shape = {"num_layers": 48, "gated_attn": gated}
    terms = GuidanceTerms(7.0, float(gated), float(gated), 3.0, 3.0, 0.7, 0.7, (28 if gated else 29,))
    return ReleasedModel(
        f"Lightricks/{name}", "ltx2", "LTX2Pipeline", 512, 768, 30, 3.0, params, shape,
        negative_prompt=LTX2_NEGATIVE, terms=terms, **_LTX2,
    )  # fmt: skip


DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
"""Those that LTX-2's distilled weights are made for."""
LTX2_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""The negative prompt of LTX-2's example in diffusers."""

MODELS: tuple[ReleasedModel, ...] = (
    _wan(
        SHIPPED, T2V, (128, 128), 1, 8, 30, 2.5, 4.0, 2_457_184, (6, 5, 16), negative_prompt=None,
        text_tokens=32, default_video_frames=17, **_TI2V | {"size_multiple": 16},
    ),
    _wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", T2V, _480P, 81, 16, 50, 3.0, 3.0, 1_418_996_800, (30, 12, 16)),
    _wan(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers", T2V, _720P, 81, 16, 50, 5.0, 5.0, 14_288_491_584, (40, 40, 16),
        stored_shift=3.0,
    ),
    _wan(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", I2V, _480P, 81, 16, 50, 5.0, 3.0, 16_394_878_784,
        (40, 40, 36), images=(1, 2),
    ),
    _wan(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", I2V, _720P, 81, 16, 50, 5.0, 5.0, 16_394_878_784,
        (40, 40, 36), images=(1, 2),
    ),
    _wan(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", T2V, _720P, 81, 16, 40, 4.0, 12.0, 28_576_983_168, (40, 40, 16),
        stored_shift=3.0, guidance_2=3.0, boundary_ratio=0.875,
    ),
    _wan(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", I2V, _720P, 81, 16, 40, 3.5, 5.0, 28_577_802_368, (40, 40, 36),
        stored_shift=3.0, guidance_2=3.5, boundary_ratio=0.9, images=(1, 2),
    ),
    _wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", T2V, _704P, 121, 24, 50, 5.0, 5.0, 4_999_787_712, (30, 24, 48),
        **_TI2V,
    ),
    ReleasedModel(
        "Wan-AI/Wan2.2-S2V-14B", "wan_s2v", "WanSpeechToVideoPipeline", 704, 1024, 40, 4.5, 16_295_755_609,
        {"num_layers": 40, "dim": 5120}, num_frames=80, fps=16, flow_shift=3.0, stored_shift=3.0,
        solver="unipc", negative_prompt=S2V_NEGATIVE, images=(1, 1), sound=True, speech=True,
    ),
    _wan(
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers", DMD_PIPELINE, _480P, 61, 16, 3, 1.0, 8.0, 1_418_996_800,
        (30, 12, 16), **_DISTILLED,
    ),
    _wan(
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", DMD_PIPELINE, _704P, 121, 24, 3, 1.0, 5.0,
        4_999_787_712, (30, 24, 48), **_DISTILLED, **_TI2V,
    ),
    ReleasedModel(
        "hunyuanvideo-community/HunyuanVideo", "hunyuan_video", "HunyuanVideoPipeline", 720, 1280, 50, 6.0,
        shape={"num_layers": 20, "num_single_layers": 40}, stored_shift=7.0, **_HUNYUAN,
    ),
    ReleasedModel(
        "FastVideo/FastHunyuan-diffusers", "hunyuan_video", "HunyuanVideoPipeline", 720, 1280, 6, 6.0,
        shape={"num_layers": 20, "num_single_layers": 40}, stored_shift=17.0, **_HUNYUAN,
    ),
    ReleasedModel(
        "hunyuanvideo-community/HunyuanVideo-I2V", "hunyuan_video", "HunyuanVideoImageToVideoPipeline", 720,
        1280, 50, 6.0, shape={"image_condition_type": "token_replace"}, stored_shift=7.0,
        images=(1, 1), **_HUNYUAN,
    ),
    ReleasedModel(
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch", "hunyuan_video", "HunyuanVideoImageToVideoPipeline",
        720, 1280, 50, 1.0, 12_810_991_680, {"image_condition_type": "latent_concat"}, stored_shift=7.0,
        num_frames=129, fps=24, guidance_form="true", negative_prompt=None, text_tokens=256, images=(1, 1),
    ),
    _hunyuan15("480p", "t2v", 5.0),
    _hunyuan15("480p", "t2v", 5.0, "distilled"),
    _hunyuan15("720p", "t2v", 9.0),
    _hunyuan15("480p", "i2v", 5.0),
    _hunyuan15("480p", "i2v", 5.0, "distilled"),
    _hunyuan15("480p", "i2v", 7.0, "step_distilled", steps=12, params=8_331_330_848),
    _hunyuan15("720p", "i2v", 7.0),
    _hunyuan15("720p", "i2v", 7.0, "distilled"),
    _ltx2("LTX-2", 18_876_174_592, gated=False),
    ReleasedModel(
        "Lightricks/LTX-2.5-Diffusers", "ltx2", "LTX2Pipeline", 544, 960, 8, 1.0, 18_987_855_104,
        {"num_layers": 48, "gated_attn": True, "ff_bias": False}, sigmas=DISTILLED_SIGMAS,
        terms=GuidanceTerms(spatio_temporal_guidance_blocks=(28,)), negative_prompt=None, **_LTX2,
    ),
    _ltx2("LTX-2.3", 18_988_838_144, gated=True),
    ReleasedModel(
        "black-forest-labs/FLUX.1-dev", "flux", "FluxPipeline", 1024, 1024, 50, 3.5, 11_901_408_320,
        {"guidance_embeds": True}, guidance_form="embedded", **_START,
    ),
    ReleasedModel(
        "black-forest-labs/FLUX.1-schnell", "flux", "FluxPipeline", 1024, 1024, 4, 1.0, 11_891_178_560,
        {"guidance_embeds": False}, guidance_form="true", negative_prompt=None, text_tokens=256, **_START,
    ),
    ReleasedModel(
        "black-forest-labs/FLUX.1-Kontext-dev", "flux", "FluxKontextPipeline", 1024, 1024, 28, 2.5,
        11_901_408_320, {"guidance_embeds": True}, guidance_form="embedded", images=(1, 4),
        image_use="references",
    ),
    ReleasedModel(
        "AIDC-AI/Ovis-Image-7B", "ovis", "OvisImagePipeline", 1024, 1024, 50, 5.0, 7_370_449_728,
        {"num_layers": 6, "num_single_layers": 27}, text_tokens=256, **_START,
    ),
    ReleasedModel(
        "Tongyi-MAI/Z-Image-Turbo", "z_image", "ZImagePipeline", 1024, 1024, 8, 0.0, 6_154_908_736,
        {"dim": 3840, "n_layers": 30}, guidance_form="offset", negative_prompt=None, **_START,
    ),
    ReleasedModel(
        "Tongyi-MAI/Z-Image", "z_image", "ZImagePipeline", 1024, 1024, 50, 5.0, 6_154_908_736,
        {"dim": 3840, "n_layers": 30}, guidance_form="offset", **_START,
    ),
    ReleasedModel(
        "stabilityai/stable-diffusion-3-medium-diffusers", "sd3", "StableDiffusion3Pipeline", 1024, 1024, 28,
        7.0, 2_028_328_000, {"num_layers": 24, "pos_embed_max_size": 192}, text_tokens=256, **_START,
    ),
    ReleasedModel(
        "stabilityai/stable-diffusion-3.5-medium", "sd3", "StableDiffusion3Pipeline", 1024, 1024, 40, 4.5,
        2_243_171_520, {"num_layers": 24, "pos_embed_max_size": 384}, text_tokens=256, **_START,
    ),
    ReleasedModel(
        "stabilityai/stable-diffusion-3.5-large", "sd3", "StableDiffusion3Pipeline", 1024, 1024, 28, 3.5,
        8_056_627_520, {"num_layers": 38}, text_tokens=256, **_START,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image", "qwen_image", "QwenImagePipeline", 1024, 1024, 50, 4.0, shape={"num_layers": 60},
        **_QWEN, **_START,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image-2512", "qwen_image", "QwenImagePipeline", 1024, 1024, 50, 4.0,
        shape={"num_layers": 60}, **_QWEN_2512, **_START,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image-Edit", "qwen_image", "QwenImageEditPipeline", 1024, 1024, 50, 4.0,
        shape={"num_layers": 60}, **_QWEN_EDIT,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image-Edit-2511", "qwen_image", "QwenImageEditPlusPipeline", 1024, 1024, 40, 4.0,
        shape={"num_layers": 60, "zero_cond_t": True}, **_QWEN_EDIT_PLUS,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image-Edit-2509", "qwen_image", "QwenImageEditPlusPipeline", 1024, 1024, 40, 4.0,
        shape={"num_layers": 60}, **_QWEN_EDIT_PLUS,
    ),
    ReleasedModel(
        "Qwen/Qwen-Image-Layered", "qwen_image", "QwenImageLayeredPipeline", 640, 640, 50, 4.0,
        shape={"num_layers": 60, "use_layer3d_rope": True}, layers=4, captions=True, **_QWEN_LAYERED,
    ),
    ReleasedModel(
        "black-forest-labs/FLUX.2-dev", "flux2", "Flux2Pipeline", 1024, 1024, 50, 4.0, 32_223_281_152,
        {"num_layers": 8, "num_single_layers": 48}, guidance_form="embedded", **_FLUX2,
    ),
    _klein("4B", True, 3_875_544_576, (5, 20, 24)),
    _klein("base-4B", False, 3_875_544_576, (5, 20, 24)),
    _klein("9B", True, 9_078_581_248, (8, 24, 32)),
    _klein("base-9B", False, 9_078_581_248, (8, 24, 32)),
    ReleasedModel(
        "baidu/ERNIE-Image", "ernie", "ErnieImagePipeline", 1024, 1024, 50, 4.0, **_ERNIE, **_START,
    ),
    ReleasedModel(
        "baidu/ERNIE-Image-Turbo", "ernie", "ErnieImagePipeline", 1024, 1024, 8, 1.0, negative_prompt=None,
        **_ERNIE, **_START,
    ),
)  # fmt: skip


def find(name: str) -> ReleasedModel | None:
    """The row of a hub id, of its last part, or of a directory named by that part; None without one."""
    tail = name.rstrip("/").rsplit("/", 1)[-1]
    return next((row for row in MODELS if name == row.name or tail == row.name.rsplit("/", 1)[-1]), None)


def named(model_id: str) -> ReleasedModel:
    """The row that --model-id names. Raises UserError with the nearest name."""
    row = find(model_id)
    if row is None:
        begun = [row.name for row in MODELS if row.name.startswith(model_id)]
        hint = nearest(model_id, begun or [row.name for row in MODELS])
        raise UserError(
            "model_id", f"model_id: {model_id!r} is not a known model (`tinydiff models` lists them){hint}"
        )
    return row


def _kind(class_name: str, options: Entries) -> Kind:
    experts = 1 if options.get("boundary_ratio") is None else 2
    return class_name, experts, bool(options.get("expand_timesteps")), bool(options.get("is_distilled"))


def describe(kind: Kind) -> str:
    """A kind as a phrase with the names of model_index.json."""
    class_name, experts, expand, distilled = kind
    settings = {"boundary_ratio": experts == 2, "expand_timesteps": expand, "is_distilled": distilled}
    words = [name for name, is_set in settings.items() if is_set]
    return f"{class_name} with {' and '.join(words)}" if words else class_name


def match(class_name: str, options: Entries, transformer: Entries, name: str) -> ReleasedModel:
    """The row whose defaults a model directory uses.

    It is the row of the directory's name if that has the same kind, else the first row of the kind with
    the transformer's shape, else the first row of the kind. class_name, options: of `model_index.json`.
    transformer: `transformer/config.json`. Two released models of one shape (I2V 480P and 720P) cannot be
    told apart without a name; the first is used, and --model-id chooses. Raises UserError for an
    unsupported class.
    """
    kind = _kind(class_name, options)
    row = find(name)
    if row is not None and row.kind == kind:
        return row
    classes = sorted({row.pipeline for row in MODELS})
    if class_name not in classes:
        hint = nearest(class_name, classes)
        raise UserError(
            "model_path",
            f"model_path: {name!r} is a {class_name}; supported classes are {', '.join(classes)}{hint}",
        )
    rows = [row for row in MODELS if row.kind == kind]
    if not rows:
        message = f"{name!r} is a {describe(kind)}, a combination that no supported model has"
        raise UserError("model_path", f"model_path: {message}")
    entries = {**options, **transformer}
    same = [row for row in rows if all(entries.get(key) == value for key, value in row.shape.items())]
    # The shipped model's defaults are used for no other model.
    return next(row for row in (*same, *rows) if row.name != SHIPPED or row in same)
