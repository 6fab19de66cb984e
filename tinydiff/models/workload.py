"""What a network costs, read from its rows, so that layouts are compared without running anything.

A test holds the rows of every family to the operations that torch counts in one evaluation.
"""

from __future__ import annotations

from tinydiff.models.family import Autoencoder, Denoiser
from tinydiff.ops.network import Config
from tinydiff.parallel.cost import CostModel


def cost_model(family: Denoiser, config: Config) -> CostModel:
    """A family's network as its costs see it."""
    rows = tuple(family.spec(config))
    blocks = [[row for row in rows if row.name.startswith(f"{at}.")] for _, at in family.blocks(config)]
    inside = {row.name for block in blocks for row in block}
    last = [row for row in rows if row.input == "image" and row.name not in inside][-1]
    return CostModel(
        rows=rows,
        blocks=tuple(tuple(block) for block in blocks),
        heads=family.heads(config),
        head_width=family.head_width(config),
        values=last.shape[0],
        pooled=family.pooled,
    )


def decode_bytes(
    vae: Autoencoder, c: Config, frames: int, height: int, width: int, passes: int, ranks: int, b: int
) -> int | None:
    """Bytes at the peak of decoding an image or video whose rows are divided over ranks.

    None for an autoencoder whose stages are unknown. frames, height, width: of the output, in pixels.
    passes: latent frames at once. b: bytes of a value.
    The largest stage holds about three tensors of the width that enters a residual block and one of that
    which leaves it, or what enters and leaves a doubling of the resolution, each (width) (frames of the
    pass) (pixels) b. Where convolutions look back on frames, there is one more of the width that enters, two
    where passes follow each other, each two frames longer, and beside them the last two frames that every
    convolution has read. Where norms of half types are computed in float32, two tensors of that type stand
    beside three others instead. Then the pixels decoded so far; in the end three copies of all, on every
    rank.
    """
    if vae.peak is not None:
        return max(vae.peak(c, frames, height, width), 3 * frames * height * width * 3) * b
    if vae.up_stages is None:
        return None
    latents = (frames - 1) // c.scale_factor_temporal + 1
    passes = passes if vae.frames_per_pass is None else vae.frames_per_pass(c)
    patch = getattr(c, "patch_size", None)
    now, folded = min(passes, latents), patch if isinstance(patch, int) else 1
    looks_back = c.scale_factor_temporal > 1 and vae.frames_per_pass is None  # a fixed pass sees itself alone
    first = latents <= passes  # the first frame is not doubled
    stages = list(vae.up_stages(c))
    places = height * width // folded**2 // 4 ** sum(stage.resample is not None for stage in stages)
    most = past = 0
    for stage in stages:
        for _, inner, outer in stage.blocks:
            read = looks_back * (frames > 1) * (1 if first else 2) * inner * (now + 2) * places
            normed = (inner + 2 * outer + 8 // b * outer) * (vae.wide_norms and b < 4)
            most = max(most, (3 * inner + outer) * now * places + read, normed * now * places)
            past += (inner + outer) * looks_back * min(now, 2) * places
        if stage.resample is not None:
            wide = stage.blocks[-1][2]
            now = 2 * now - first if getattr(stage.resample, "time", False) else now
            places *= 4
            most = max(most, (wide + getattr(stage.resample, "width_out", wide)) * now * places)
    pixels = frames * height * width * 3
    return max((most + past + pixels) // ranks, 3 * pixels) * b
