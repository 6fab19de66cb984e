"""A tiny family: self-attention, cross-attention to a hoisted key and value, modulation by a hoisted row of
the step.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear
from tinydiff.ops.network import Network
from tinydiff.ops.norm import layer_norm
from tinydiff.parallel.plan import Cond, Plan
from tinydiff.sampling import loop, solvers

WIDTH, PACKED, TEXT, HEADS = 16, 8, 5, 2
PLAN = Plan()
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@dataclass(frozen=True, eq=False)
class Family:
    """The functions that the loop asks for."""

    hoist: Any
    pre: Any
    blocks: Any
    post: Any
    conds: tuple[Cond, ...]
    pooled: bool = False
    spec: Any = None
    denoised_streams: int = 1


@dataclass(frozen=True)
class Config:
    layers: int = 4


def _heads(x):
    return x.unflatten(-1, (HEADS, -1))


def block(c, plan, w, x, request, shared):
    shift, scale, gate = (shared["modulation"] + w["table"]).chunk(3, -1)
    y = layer_norm(x) * (1 + scale) + shift
    q, k, v = linear(y, w / "qkv").chunk(3, -1)
    x = x + gate * attention(plan, _heads(q) * shared["cos"][None, :, None], _heads(k), _heads(v)).flatten(2)
    return x + attention(plan, _heads(linear(x, w / "q")), request["k"], request["v"]).flatten(2)


def hoist(c, plan, w, inputs, t):
    text = inputs["text"]
    request = {
        "cos": torch.cos(
            torch.arange(inputs["tokens"].item(), dtype=text.dtype)[:, None]
            * torch.arange(WIDTH // HEADS)
            / 9
        )
    }
    for i in range(c.layers):
        for name in ("k", "v"):
            request[f"blocks.{i}.{name}"] = _heads(linear(text, w / "blocks" / i / name))
    return request, {
        "modulation": torch.cos(t.to(text.dtype)[:, None, None, None] * torch.arange(3 * WIDTH) / 1000)
    }


family = Family(
    hoist=hoist,
    pre=lambda c, plan, w, x, request, step: linear(x, w / "enter"),
    blocks=lambda c: [(block, f"blocks.{i}") for i in range(c.layers)],
    post=lambda c, plan, w, x, request, step: linear(x, w / "leave"),
    conds=(Cond("cos", "image", shared=True), Cond("absent", "image", shared=True)),
)


def _joint_block(c, plan, w, streams, request, shared):
    """Attention over both streams at once, text first; keys of padding would be masked here,
    there is none.
    """
    text, image = streams
    q, k, v = (_heads(torch.cat([linear(text, w / name), linear(image, w / name)], 1)) for name in "qkv")
    y = linear(attention(plan, q, k, v).flatten(2), w / "qkv").chunk(3, -1)[0] * (
        1 + request["scale"] + shared["modulation"][..., :WIDTH]
    )
    return text + y[:, : text.shape[1]], image * shared["cos"].sum(-1, keepdim=True).tanh() + y[
        :, text.shape[1] :
    ]


def _joint_hoist(c, plan, w, inputs, t):
    request, steps = hoist(c, plan, w, inputs, t)
    scales = {
        f"blocks.{i}.scale": torch.sin(t.to(inputs["text"].dtype)[:, None, None, None] / (900 + 50 * i))
        for i in range(c.layers)
    }
    return {"cos": request["cos"], "text": linear(inputs["text"], w / "enter_text")}, steps | scales


joint = Family(
    hoist=_joint_hoist,
    pre=lambda c, plan, w, x, request, step: (
        request["text"].expand(x.shape[0], -1, -1),
        linear(x, w / "enter"),
    ),
    blocks=lambda c: [(_joint_block, f"blocks.{i}") for i in range(c.layers)],
    post=lambda c, plan, w, streams, request, step: linear(streams[1], w / "leave"),
    conds=(Cond("cos", "image", shared=True), Cond("text", "text", dim=1)),
)
"""A tiny family of two streams, text and image, and as many text tokens as a prompt has."""


def weights(c, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "enter_text.weight": (WIDTH, WIDTH),
        "enter.weight": (WIDTH, PACKED),
        "enter.bias": (WIDTH,),
        "leave.weight": (PACKED, WIDTH),
    }
    for i in range(c.layers):
        shapes |= {f"blocks.{i}.qkv.weight": (3 * WIDTH, WIDTH), f"blocks.{i}.table": (1, 1, 3 * WIDTH)}
        shapes |= {f"blocks.{i}.{name}.weight": (WIDTH, WIDTH) for name in "qkv"}
    return {
        name: (torch.randn(shape, generator=generator) * 0.6 / shape[-1] ** 0.5).to(dtype)
        for name, shape in shapes.items()
    }


def ready(
    c, table, tokens, branches=2, images=1, seed=0, dtype=torch.float32, net=family, lengths=(TEXT, TEXT)
):
    """The network for a request of `tokens` tokens, texts of `lengths`."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        torch.randn(images, length, WIDTH, generator=generator).to(dtype) for length in lengths[:branches]
    ]
    inputs = [{"text": text, "tokens": torch.tensor(tokens)} for text in texts]
    return loop.hoist(Network(net, c, PLAN, dtype), weights(c, seed, dtype), inputs, table)


def table(config=UNIPC, steps=4, guidance=3.0):
    return solvers.with_guidance(solvers.from_scheduler_config(config, steps), guidance)


def latents(tokens, batch=1, seed=1, dtype=torch.float32):
    return torch.randn(batch, tokens, PACKED, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last(*args, **kwargs):
    """The final latents of a run."""
    return list(loop.run(*args, **kwargs))[-1].x
