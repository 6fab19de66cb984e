"""Text and image streams that meet in attention: parts of double-stream blocks, and FLUX.1's two blocks.

Between blocks text [B, T, D] and image [B, L, D] stay apart, so that no tensor of the derived length T + L
crosses a block's boundary. Inside a block they are joined, text rows first. Ovis-Image has FLUX.1's blocks
too. Source: arXiv 2403.03206; single stream: FLUX.1's reference code.

Shape letters: B batch, T text tokens, L image tokens, D width, H heads, E head width, F hidden width of a
feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.activations import Activation
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import modulate, rms_norm
from tinydiff.ops.rope import rope_table, rotate_interleaved
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import keys

Heads = tuple[Tensor, Tensor, Tensor]
Streams = tuple[Tensor, Tensor]

IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
"""The checkpoints' names of a stream's projections and norms in joint attention."""

# --- pieces


def heads(
    w: Weights,
    x_BLD: Tensor,
    width: int,
    rope: tuple[Tensor, Tensor] | None = None,
    names: tuple[str, ...] = IMAGE,
    eps: float = 1e-6,
) -> Heads:
    """Queries, keys and values [B, L, H, width] of one stream, by the weights `names` below `w`.

    Queries and keys are normalised per head where `w` has the norms, then rotated in interleaved pairs where
    `rope`, the cosines and sines [L, width / 2] of this stream, is given.
    """
    q, k, v = (torch.unflatten(linear(x_BLD, w / name), -1, (-1, width)) for name in names[:3])
    q, k = (
        rms_norm(x, w / name, eps) if f"{name}.weight" in w else x
        for x, name in zip((q, k), names[3:], strict=True)
    )
    if rope is not None:
        q, k = rotate_interleaved(q, *rope), rotate_interleaved(k, *rope)
    return q, k, v


def rope_tables(
    text_TA: Tensor,
    image_LA: Tensor,
    dims: Sequence[int],
    dtype: torch.dtype,
    theta: float = 1e4,
    angles: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Rope tables of both streams: `cos`, `sin` [L, E / 2] and `text_cos`, `text_sin` [T, E / 2].

    text_TA, image_LA: positions on A axes. The tables are computed in `angles` and stored in `dtype`.
    """
    tables: dict[str, Tensor] = {}
    for prefix, positions in (("", image_LA), ("text_", text_TA)):
        for name, table in zip(("cos", "sin"), rope_table(positions, dims, theta, angles), strict=True):
            tables[prefix + name] = table.to(dtype)
    return tables


def joint_attention(plan: Plan, text: Heads, image: Heads, shared: Mapping[str, Tensor]) -> Streams:
    """Attention of both streams to both -> ([B, T, D], [B, L, D]), heads flattened.

    text, image: queries, keys and values [B, T or L, H, E]. shared: its `mask` [B, T], if present, is 1
    where a text token is real; the others are not attended to. The results are views of one tensor, see
    `split`.
    """
    q, k, v = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))
    mask = joint_mask(shared["mask"], image[0].shape[1]) if "mask" in shared else None
    y = attention(plan, q, k, v, mask, keys=keys(plan, shared, "joint")).flatten(2)
    return split(y, text[0].shape[1])


def joint_mask(mask_BT: Tensor, tokens: int) -> Tensor:
    """Which keys of the joint sequence are attended to: bool [B, 1, 1, T + tokens].

    These are the real text tokens and all image tokens.
    """
    return F.pad(mask_BT.bool(), (0, tokens), value=True)[:, None, None]


def split(x_BSD: Tensor, length: int) -> Streams:
    """A joint sequence -> its text rows, the first `length`, and its image rows.

    Both are views of one tensor, which a block must not return: add them to their streams, or project them,
    first.
    """
    return x_BSD[:, :length], x_BSD[:, length:]


def feed_forward(plan: Plan, w: Weights, x_BLD: Tensor, activation: Activation) -> Tensor:
    """Linear `net.0.proj`, activation, row-split linear `net.2`."""
    return linear_sum(plan, activation(linear(x_BLD, w / "net" / "0.proj")), w / "net" / 2)


# --- the blocks of FLUX.1 and Ovis-Image


def stack_rows(double: int, single: int, d: int, width: int, hidden: tuple[int, ...]) -> Iterator[Row]:
    """Weights of both stacks and of the last norm.

    hidden: widths side by side in a feed-forward's first layer, (F,), or (F, F) for a gated one.
    """
    yield from repeat("transformer_blocks", double, _double_rows(d, width, hidden))
    yield from repeat("single_transformer_blocks", single, _single_rows(d, width, hidden))
    yield from through("steps", linear_rows("norm_out.linear", d, 2 * d))


def _double_rows(d: int, width: int, hidden: tuple[int, ...]) -> Iterator[Row]:
    for name in ("norm1", "norm1_context"):
        yield from through("steps", linear_rows(f"{name}.linear", d, 6 * d))
    yield from through("image", _heads_rows(d, width, IMAGE))
    yield from through("text", _heads_rows(d, width, TEXT))
    yield from through("image", linear_rows("attn.to_out.0", d, d, "in", attends=("joint", "joint")))
    yield from through("text", linear_rows("attn.to_add_out", d, d, "in"))
    yield from through("image", _feed_forward_rows("ff", d, hidden))
    yield from through("text", _feed_forward_rows("ff_context", d, hidden))


def _feed_forward_rows(name: str, d: int, hidden: tuple[int, ...]) -> Iterator[Row]:
    yield from linear_rows(f"{name}.net.0.proj", d, sum(hidden), "out", parts=hidden[1:] and hidden)
    yield from linear_rows(f"{name}.net.2", hidden[0], d, "in")


def _single_rows(d: int, width: int, hidden: tuple[int, ...]) -> Iterator[Row]:
    yield from through("steps", linear_rows("norm.linear", d, 3 * d))
    mlp = linear_rows("proj_mlp", d, sum(hidden), "out", parts=hidden[1:] and hidden)
    fan_in, parts = d + hidden[0], (d, hidden[0])
    out = linear_rows("proj_out", fan_in, d, "in", parts=parts, attends=("joint", "joint"))
    yield from through("joint", _heads_rows(d, width, IMAGE), mlp, out)


def _heads_rows(d: int, width: int, names: tuple[str, ...]) -> Iterator[Row]:
    for name in names[:3]:
        yield from linear_rows(f"attn.{name}", d, d, "out")
    for name in names[3:]:
        yield from norm_rows(f"attn.{name}", width)


def modulations(w: Weights, double: int, single: int, time_SBD: Tensor) -> dict[str, Tensor]:
    """The modulations of both stacks and of the last norm: [S, B, n, D] under their norms' names.

    time_SBD: the embedding of a step's timestep and whatever is added to it. `norm_out` has scale before
    shift.
    """
    norms = ("norm1", "norm1_context")
    sizes = {f"transformer_blocks.{i}.{name}": 6 for i in range(double) for name in norms}
    sizes |= {f"single_transformer_blocks.{i}.norm": 3 for i in range(single)} | {"norm_out": 2}
    active = F.silu(time_SBD)
    return {
        name: torch.unflatten(linear(active, w / name / "linear"), -1, (n, -1)) for name, n in sizes.items()
    }


FROZEN = "frozen"
"""Names the tokens [1, L, 1] of given frames, and ends the names of their own modulations."""


def _modulation(request: Weights, name: str, frozen: Tensor | None) -> tuple[Tensor, ...]:
    """The n modulations of `name`, each [B, 1, D], or [B, L, D] where some tokens are frozen.

    request: `name` [B, n, D] and, for frozen tokens, `name_frozen`.
    """
    moving = request[name].unsqueeze(2).unbind(1)
    if frozen is None:
        return moving
    fixed = request[f"{name}_{FROZEN}"].unsqueeze(2).unbind(1)
    return tuple(torch.where(frozen, a, b) for a, b in zip(fixed, moving, strict=True))


def double_block(
    plan: Plan,
    w: Weights,
    streams: Streams,
    request: Weights,
    shared: dict[str, Tensor],
    width: int,
    activation: Activation,
) -> Streams:
    """Joint attention, then a feed-forward for each stream, all modulated.

    request: `norm1` and `norm1_context` [B, 6, D]: shift, scale, gate of attention, then of the feed-forward.
    shared: the tables of `rope_tables` and, where some image tokens are frozen, which (`frozen`); these read
    `norm1_frozen`.
    """
    text, image = streams
    of_text = _modulation(request, "norm1_context", None)
    of_image = _modulation(request, "norm1", shared.get(FROZEN))
    a = w / "attn"
    y_text, y_image = modulate(text, of_text[0], of_text[1]), modulate(image, of_image[0], of_image[1])
    y_text, y_image = joint_attention(
        plan,
        heads(a, y_text, width, (shared["text_cos"], shared["text_sin"]), TEXT),
        heads(a, y_image, width, (shared["cos"], shared["sin"])),
        shared,
    )
    y_text, y_image = linear_sum(plan, y_text, a / "to_add_out"), linear_sum(plan, y_image, a / "to_out" / 0)
    return (
        _finish(plan, text, y_text, of_text, w / "ff_context", activation),
        _finish(plan, image, y_image, of_image, w / "ff", activation),
    )


def _finish(
    plan: Plan,
    x: Tensor,
    attended: Tensor,
    modulation: tuple[Tensor, ...],
    ff: Weights,
    activation: Activation,
) -> Tensor:
    """The gated residual of attention, then the modulated feed-forward."""
    _, _, gate, ff_shift, ff_scale, ff_gate = modulation
    x = x + attended * gate
    return x + feed_forward(plan, ff, modulate(x, ff_shift, ff_scale), activation) * ff_gate


def single_block(
    plan: Plan,
    w: Weights,
    streams: Streams,
    request: Weights,
    shared: dict[str, Tensor],
    width: int,
    activation: Activation,
) -> Streams:
    """Attention and feed-forward side by side on the joint sequence, behind one output projection.

    request: `norm` [B, 3, D], shift, scale and gate. shared: as in `double_block`.
    """
    text, image = streams
    frozen = shared.get(FROZEN)
    if frozen is not None:
        frozen = F.pad(frozen, (0, 0, text.shape[1], 0))  # no text token is frozen
    shift, scale, gate = _modulation(request, "norm", frozen)
    x = modulate(torch.cat(streams, 1), shift, scale)
    rope = torch.cat([shared["text_cos"], shared["cos"]]), torch.cat([shared["text_sin"], shared["sin"]])
    q, k, v = heads(w / "attn", x, width, rope)
    attended = attention(plan, q, k, v, keys=keys(plan, shared, "joint")).flatten(2)
    y = torch.cat([attended, activation(linear(x, w / "proj_mlp"))], -1)
    y = linear_sum(plan, y, w / "proj_out") * gate
    y_text, y_image = split(y, text.shape[1])
    return text + y_text, image + y_image


def last(w: Weights, image_BLD: Tensor, modulation_BnD: Tensor) -> Tensor:
    """The last norm, modulated by `norm_out` (scale, shift), and the projection -> [B, L, P]."""
    scale, shift = modulation_BnD.unsqueeze(2).unbind(1)
    return linear(modulate(image_BLD, shift, scale), w / "proj_out")
