"""How each class of component is run, and its config.json read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tinydiff.entries import typed
from tinydiff.io import hub
from tinydiff.models import ernie, flux, flux2, ovis, qwen_image, sd3, wan, z_image
from tinydiff.models.autoencoders import flux2_tiny, kl, tiny
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import clip_text, clip_vision, decoder_lm, preprocess, qwen_vision, t5
from tinydiff.models.encoders.decoder_config import CLASSES, config_from
from tinydiff.records import UserError, nearest


@dataclass(frozen=True)
class Kind:
    """How a component class of model_index.json is run."""

    module: ModuleType
    role: str
    rename: Callable[[Any, str], str | None] | None = None
    """(config, stored key) -> the spec's name, or None for what is known and not read."""
    heads: Callable[[Any], tuple[int, bool]] | None = None
    """Config -> (width of a head, whether attention has a bias); None where the attention kernel is not a choice."""
    config: Callable[[Mapping[str, Any], str], Any] | None = None
    """(config.json, class name) -> the module's Config, where its fields are not simply those. Else every field must be known."""
    longest_side: Callable[[Any], int] | None = None
    """Config -> the most latent pixels along a side; None where there is no limit."""
    given_size: Callable[[int, int, int], tuple[int, int]] | None = None
    """(height and width of a given picture, what both must divide by) -> those of the output, where they follow the picture's own. Raises
    UserError for a picture that cannot be given.
    """
    preprocessor: tuple[str, Callable[[Mapping[str, Any], Any], dict[str, Any]]] | None = None
    """(component whose files say how images are made ready, what they say and the Config -> the Config's fields for it)."""
    settles: Mapping[str, Mapping[str, Any]] | None = None
    """Component -> fields of its config that the pipeline sets whatever its config.json says."""
    own_grid: tuple[str, ...] = ()
    """Pipeline classes that, from text, leave a scheduler with flow sigmas (UniPC) its own grid."""
    head_count: Callable[[Any], int] = lambda c: c.num_attention_heads
    """Config of a denoiser -> its attention heads, for keys as for queries."""


def _keys(name: Callable[[str], str | None]) -> Callable[[Any, str], str | None]:
    return lambda c, key: name(key)


def _dit(module: ModuleType, width: Callable[[Any], int] = lambda c: c.attention_head_dim, **more: Any) -> Kind:
    return Kind(module, "dit", heads=lambda c: (width(c), False), **more)


_T5 = Kind(t5, "text_encoder", _keys(t5.row_name), lambda c: (c.d_kv, True), t5.config_from)
_CLIP_TEXT = Kind(
    clip_text, "text_encoder", clip_text.row_name, lambda c: (c.hidden_size // c.num_attention_heads, True), clip_text.config_from
)
_CLIP = Kind(
    clip_vision, "image_encoder", _keys(clip_vision.row_name), lambda c: (c.hidden_size // c.num_attention_heads, False),
    clip_vision.config_from, preprocessor=("image_processor", lambda entries, c: preprocess.clip(entries, c.image_size)),
)  # fmt: skip
LM = Kind(decoder_lm, "text_encoder", decoder_lm.row_name, lambda c: (c.head_dim, True), config_from)
_KL = Kind(kl, "vae", _keys(kl.row_name))

NETS = {
    "WanTransformer3DModel": _dit(wan, rename=_keys(wan.rename)),
    "FluxTransformer2DModel": _dit(flux, own_grid=("FluxPipeline",)),
    "OvisImageTransformer2DModel": _dit(ovis, own_grid=("OvisImagePipeline",)),
    "Flux2Transformer2DModel": _dit(flux2, own_grid=("Flux2Pipeline", "Flux2KleinPipeline"), given_size=flux2.reference_size),
    "ErnieImageTransformer2DModel": _dit(ernie, lambda c: c.hidden_size // c.num_attention_heads, settles=ernie.SETTLES),
    "QwenImageTransformer2DModel": _dit(qwen_image),
    "ZImageTransformer2DModel": _dit(
        z_image, lambda c: c.dim // c.n_heads, head_count=lambda c: c.n_heads, longest_side=z_image.longest_side
    ),
    "SD3Transformer2DModel": _dit(sd3, longest_side=sd3.longest_side),
    **dict.fromkeys(("AutoencoderKLWan", "AutoencoderKLQwenImage"), Kind(wan_vae, "vae")),
    **dict.fromkeys(("AutoencoderKL", "AutoencoderKLFlux2"), _KL),
    "AutoencoderTiny": Kind(tiny, "vae"),
    "Flux2TinyAutoEncoder": Kind(flux2_tiny, "vae"),
    **dict.fromkeys(("UMT5EncoderModel", "T5EncoderModel"), _T5),
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), _CLIP_TEXT),
    **dict.fromkeys(("CLIPVisionModel", "CLIPVisionModelWithProjection"), _CLIP),
    **dict.fromkeys(CLASSES, LM),
}
"""Component class -> how it is run."""

LANGUAGE_AND_VISION = "Qwen2_5_VLForConditionalGeneration"
VISION = Kind(
    qwen_vision, "image_encoder", _keys(qwen_vision.row_name), lambda c: (c.hidden_size // c.num_heads, True),
    lambda entries, _: qwen_vision.config_from(entries), preprocessor=("processor", lambda entries, c: preprocess.qwen(entries, c.tiling)),
)  # fmt: skip
"""The tower of such a component, loaded as a network "vision" of its own where the model looks at pictures."""


def read_config(kind: Kind, path: Path, class_name: str) -> Any:
    """The network's `Config` from its config.json. Raises UserError for a field whose meaning is unknown, or a value out of range."""
    stored = hub.read_json(path)
    try:
        config = _config(kind, stored) if kind.config is None else kind.config(stored, class_name)
        for row in kind.module.spec(config):
            if 0 in row.shape:
                raise ValueError(f"{row.name} would have the shape {list(row.shape)}")
    except (ValueError, TypeError) as error:
        raise UserError("model_path", f"{path}: {error}") from error
    except (ArithmeticError, LookupError) as error:
        raise UserError("model_path", f"{path}: its numbers describe no network ({type(error).__name__}: {error})") from error
    return config


def _config(kind: Kind, stored: Mapping[str, Any]) -> Any:
    """The Config whose fields are the file's own; an unknown field that holds null says nothing."""
    entries = {name: value for name, value in stored.items() if not name.startswith("_")}
    known = {f.name for f in fields(kind.module.Config)}
    if unknown := sorted(name for name in entries.keys() - known if entries[name] is not None):
        raise ValueError(f"field {unknown[0]!r} is not known to {kind.module.__name__}{nearest(unknown[0], known)}")
    return kind.module.Config(**typed(kind.module.Config, entries))


def preprocessed(kind: Kind, config: Any, folder: Path) -> Any:
    """An encoder's Config with what the preprocessor's files say; transformers 5 may keep that in processor_config.json."""
    assert kind.preprocessor is not None
    files = {name: folder / f"{name}_config.json" for name in ("processor", "preprocessor")}
    found = {name: hub.read_json(path) for name, path in files.items() if path.is_file()}
    inner = found.get("processor", {}).get("image_processor")
    name = "processor" if isinstance(inner, dict) else "preprocessor"
    try:
        return (
            replace(config, **kind.preprocessor[1](inner if isinstance(inner, dict) else found.get(name, {}), config)) if found else config
        )
    except ValueError as error:
        raise UserError("model_path", f"{files[name]}: {error}") from error
