"""What a step asks of each family's weights, so that layouts are weighed without running anything.

The checkpoints of all families name alike what does alike, so two tables serve them all. That the tables are
right is held by a test: the operations they add up to are those that torch counts in one evaluation of every
family.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tinydiff.models.family import Autoencoder, Denoiser
from tinydiff.parallel.cost import CostModel

READS: dict[str, str] = {
    "blocks.*.attn2.to_[kv]": "kept",  # Wan's cross-attention
    "blocks.*.attn2.norm_k": "",
    "blocks.*.attn2.add_[kv]_proj": "seen",
    "*.norm_added_k": "",
    "*.time_proj": "table",
    "*adaLN_modulation.[01]": "table",
    "*_modulation*.linear": "table",
    "*_mod.1": "table",
    "*norm*.linear": "table",
    "context_embedder": "kept",
    "txt_in": "kept",
    "text_proj": "kept",
    "cap_embedder.1": "kept",
    "*.add_?_proj": "text",
    "*.to_add_out": "text",
    "*.ff_context.*": "text",
    "*.txt_mlp.*": "text",
    "single_transformer_blocks.*": "joint",
    "layers.*": "joint",
    "blocks.*": "image",
    "transformer_blocks.*": "image",
    "noise_refiner.*": "image",
    "all_final_layer.*.linear": "image",
    "all_x_embedder.*": "image",
    "final_linear": "image",
    "img_in": "image",
    "patch_embedding": "image",
    "pos_embed.proj": "image",
    "proj_out": "image",
    "x_embedder*": "image",
}
"""Pattern of a layer's name -> what passes through it, as `cost.CostModel.reads` says; the first that fits
counts, "" is nothing.
"""

ATTENDS: dict[str, tuple[str, str]] = {
    "blocks.*.attn1.to_out.0": ("image", "image"),
    "blocks.*.attn2.to_out.0": ("image", "words"),
    "blocks.*.attn2.add_k_proj": ("image", "views"),
    "transformer_blocks.*.attn2.to_out.0": ("image", "image"),
    "transformer_blocks.*.attn.to_out.0": ("joint", "joint"),
    "single_transformer_blocks.*.proj_out": ("joint", "joint"),
    "single_transformer_blocks.*.attn.to_out": ("joint", "joint"),
    "noise_refiner.*.attention.to_out.0": ("image", "image"),
    "layers.*attention.to_out.0": ("joint", "joint"),
}
"""Pattern of a layer that an attention has once -> the streams of its queries and of its keys."""


LAST = ("proj_out", "final_linear", "all_final_layer.*.linear")
"""What the layer that gives a token's velocity is called."""


def network(family: Denoiser, config: Any) -> CostModel:
    """A family's network as its costs see it."""
    rows = tuple(family.spec(config))
    layers = {row.name.removesuffix(".weight"): row for row in rows if row.name.endswith(".weight")}
    streams = {layer: stream for layer in layers if (stream := _first(READS, layer))}
    heads = family.heads(config)
    [last] = [layers[layer] for layer in layers if any(fnmatchcase(layer, pattern) for pattern in LAST)]
    return CostModel(
        rows=rows,
        blocks=tuple(
            tuple(row for row in rows if row.name.startswith(f"{prefix}."))
            for _, prefix in family.blocks(config)
        ),
        reads={
            layers[layer].name: stream for layer, stream in streams.items() if len(layers[layer].shape) > 1
        },
        norms=tuple(
            stream
            for layer, stream in streams.items()
            if len(layers[layer].shape) == 1 and layers[layer].split == 0
        ),
        attends=tuple(pair for layer in layers if (pair := _first(ATTENDS, layer))),
        heads=heads,
        head_width=last.shape[1] // heads,
        values=last.shape[0],
        pooled=family.pooled,
    )


def _first(table: Mapping[str, Any], layer: str) -> Any:
    return next((found for pattern, found in table.items() if fnmatchcase(layer, pattern)), None)


def decode_bytes(
    vae: Autoencoder, c: Any, frames: int, height: int, width: int, passes: int, ranks: int, b: int
) -> int | None:
    """Bytes at the peak of decoding an image or video whose rows are divided over ranks.

    None for an autoencoder whose stages are unknown. frames, height, width: of the output, in pixels.
    passes: latent frames at once. b: bytes of a value.
    The largest stage holds about three tensors of the width that enters a residual block and one of that
    which leaves it, or what enters and leaves a doubling of the resolution, each (width) (frames of the
    pass) (pixels) b. Where convolutions look back on frames, there are two more of the width that enters,
    each two frames longer where passes follow each other, and beside them the last two frames that every
    convolution has read. Then the pixels decoded so far; in the end three copies of all, on every rank.
    """
    if vae.up_stages is None:
        return None
    latents = (frames - 1) // c.scale_factor_temporal + 1
    now, folded = min(passes, latents), c.patch_size if isinstance(c.patch_size, int) else 1
    looks_back, first = (
        c.scale_factor_temporal > 1,
        latents <= passes,
    )  # a clip's first frame is not doubled in time
    stages = list(vae.up_stages(c))
    places = height * width // folded**2 // 4 ** sum(stage.resample is not None for stage in stages)
    most = past = 0
    for stage in stages:
        for _, inner, outer in stage.blocks:
            read = looks_back * (now + 2 * (not first)) * places
            most = max(most, (3 * inner + outer) * now * places + 2 * inner * read * (frames > 1))
            past += (inner + outer) * looks_back * min(now, 2) * places
        if stage.resample is not None:
            wide = stage.blocks[-1][2]
            now = 2 * now - first if getattr(stage.resample, "time", False) else now
            places *= 4
            most = max(most, (wide + getattr(stage.resample, "width_out", wide)) * now * places)
    pixels = frames * height * width * 3
    return max((most + past + pixels) // ranks, 3 * pixels) * b
