"""Costs by arithmetic: a network small enough for paper, then what torch counts when every family runs on the
meta device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from math import prod

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases
from tinydiff.entries import typed
from tinydiff.models import ernie, hunyuan_video, hunyuan_video15, registry, sd3, wan, workload
from tinydiff.models.autoencoders import hunyuan, hunyuan15, kl, ltx2_video
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.released import REPOSITORIES
from tinydiff.ops.attention import BACKENDS
from tinydiff.ops.network import Branch, Network
from tinydiff.ops.weights import Weights
from tinydiff.parallel import cost
from tinydiff.parallel.cost import CostModel, Machine, Work
from tinydiff.parallel.layout import AXES, Layout
from tinydiff.parallel.plan import Group, Plan, Row
from tinydiff.parallel.shards import local_rows
from tinydiff.sampling import loop, solvers

# --- on paper ---

BLOCK = (
    Row("b.0.q.weight", (12, 12), split=0, input="joint"),
    Row("b.0.norm.weight", (12,), split=0, input="joint"),
    Row("b.0.o.weight", (12, 12), split=1, input="joint", attends=("joint", "joint")),
    Row("b.0.o.bias", (12,), float32=True),
    Row("b.0.mod.weight", (24, 12), input="steps"),
)
TINY = CostModel(
    rows=(Row("in.weight", (12, 4), input="image"), *BLOCK, Row("out.weight", (4, 12), input="image")),
    blocks=(BLOCK,),
    heads=3,
    head_width=4,
    values=4,
)
"""One block: queries of three heads of four, which attend to themselves, and a layer back; keys and values
are left to the imagination.
"""
ASKED = Work(image=10, text=3, steps=5)


def test_weights_on_paper():
    values = 48 + 144 + 12 + 144 + 288 + 48
    assert cost.weight_bytes(TINY.rows, 2) == 2 * values + 4 * 12
    assert cost.weight_bytes(TINY.rows, 2, tp=3) == 2 * (48 + 48 + 4 + 48 + 288 + 48) + 4 * 12
    # two ranks: 6 of 12 rows of each weight, 12 of the modulation's 24; beside them what is in no block, and
    # twice the whole block
    shares, whole = 2 * (6 * 12 + 6 + 6 * 12 + 12 * 12) + 4 * 6, 2 * (144 + 12 + 144 + 288) + 4 * 12
    assert cost.shard_bytes(BLOCK, Layout(ulysses=2, fsdp=True), 2) == shares
    assert cost.denoiser_bytes(TINY, Layout(ulysses=2, fsdp=True), 2) == shares + 2 * (48 + 48) + 2 * whole
    assert (
        cost.denoiser_bytes(TINY, Layout(ulysses=2), 2)
        == cost.denoiser_bytes(TINY, Layout(fsdp=True), 2)
        == 2 * values + 4 * 12
    )


def test_operations_on_paper():
    linear = 2 * 10 * 48 + 2 * 13 * (144 + 144) + 2 * 10 * 48
    assert cost.step_flops(TINY, Layout(), ASKED) == linear + 4 * 13 * 13 * 12
    # ulysses over 2: a rank holds 5 of 10 and 2 of 3 tokens, and 2 of the 4 heads that 3 are filled up to,
    # from all of its group
    linear = 2 * 5 * 48 + 2 * 7 * (144 + 144) + 2 * 5 * 48
    assert cost.step_flops(TINY, Layout(ulysses=2), ASKED) == linear + 4 * 7 * 13 * 16
    guided = replace(ASKED, branches=2)
    assert cost.step_flops(TINY, Layout(), guided) == 2 * cost.step_flops(TINY, Layout(cfg=2), guided)


def test_bytes_sent_on_paper():
    assert cost.step_bytes(TINY, Layout(), ASKED) == {}
    assert cost.step_bytes(TINY, Layout(ulysses=2), ASKED) == {"ulysses": 4 * 7 * 16 * 2}
    assert cost.step_bytes(TINY, Layout(ulysses=3), ASKED) == {"ulysses": 4 * 5 * 12 * 2}
    assert cost.step_bytes(TINY, Layout(ring=2), ASKED) == {"ring": 2 * 7 * 12 * 2}
    assert cost.step_bytes(TINY, Layout(ring=3), ASKED, b=4) == {"ring": 2 * 2 * 5 * 12 * 4}
    assert cost.step_bytes(TINY, Layout(ring=2, ulysses=2), ASKED) == {
        "ring": 2 * 4 * 16 * 2,
        "ulysses": 4 * 4 * 16 * 2,
    }
    assert cost.step_bytes(TINY, Layout(tp=3), ASKED) == {"tp": 13 * 12 * 2 + 13 * 4}
    assert cost.step_bytes(TINY, Layout(tp=3, ulysses=2), ASKED) == {
        "ulysses": 4 * 7 * 8 * 2,
        "tp": 7 * 12 * 2 + 7 * 4,
    }
    assert cost.step_bytes(TINY, Layout(cfg=2), replace(ASKED, branches=2, images=3)) == {
        "cfg": 3 * 10 * 4 * 2
    }
    assert cost.step_bytes(TINY, Layout(ulysses=2), replace(ASKED, branches=2)) == {
        "ulysses": 2 * 4 * 7 * 16 * 2
    }
    share = cost.shard_bytes(BLOCK, Layout(ring=2, fsdp=True), 2)
    assert cost.step_bytes(TINY, Layout(ring=2, fsdp=True), ASKED) == {"ring": 2 * 7 * 12 * 2, "fsdp": share}
    assert cost.step_bytes(TINY, Layout(tp=3, fsdp=True), ASKED) == cost.step_bytes(TINY, Layout(tp=3), ASKED)


def test_memory_on_paper():
    streams, given, latents = 7 * 13 * 12 * 2, 13 * 12 * 2, 10 * 4 * 4 * 4
    assert cost.activation_bytes(TINY, Layout(), ASKED, 2) == streams + given + latents
    assert cost.activation_bytes(TINY, Layout(tp=3), ASKED, 2) == streams + given // 3 + latents
    assert cost.hoisted_bytes(TINY, Layout(), ASKED, 2) == 5 * 24 * 2 + 13 * 4 * 4
    guided = replace(ASKED, branches=2)
    assert cost.hoisted_bytes(TINY, Layout(), guided, 2) == 5 * 24 * 2 + 2 * 13 * 4 * 4
    assert cost.hoisted_bytes(replace(TINY, pooled=True), Layout(), guided, 2) == 2 * (
        5 * 24 * 2 + 13 * 4 * 4
    )


def test_seconds_on_paper():
    machine = Machine(
        tflops=1e-6, link=1e-6, net=1e-7, ranks=2
    )  # a million operations, a thousand bytes or a hundred a second
    assert cost.step_seconds(TINY, Layout(), ASKED, machine) == cost.step_flops(TINY, Layout(), ASKED) / 1e6
    shared = cost.step_flops(TINY, Layout(ulysses=2), ASKED) / 1e6
    assert cost.step_seconds(TINY, Layout(ulysses=2), ASKED, machine) == pytest.approx(shared + 896 / 2 / 1e3)
    beyond = cost.step_seconds(TINY, Layout(ulysses=2), ASKED, replace(machine, ranks=1))
    assert beyond == pytest.approx(shared + 896 / 2 / 1e2)
    gathered = cost.step_seconds(
        TINY, Layout(cfg=2, fsdp=True), replace(ASKED, branches=2), replace(machine, link=1e-8)
    )
    assert gathered == pytest.approx(cost.shard_bytes(BLOCK, Layout(cfg=2, fsdp=True), 2) / 10)


def test_an_axis_that_outgrows_a_machine_goes_over_the_network():
    layout, eight = Layout(cfg=2, ring=2, ulysses=2, tp=2), Machine(ranks=8)
    assert [
        cost.crosses_machines(layout, axis, eight) for axis in ("tp", "ulysses", "ring", "cfg", "fsdp")
    ] == [
        False,
        False,
        False,
        True,
        True,
    ]


# --- as torch counts ---

PICTURES = {
    "FLUX.1-dev": 9, "FLUX.1-schnell": 9, "FLUX.2-dev": 9, "Qwen-Image": 9, "Z-Image": 32,
    "stable-diffusion-3-medium-diff" "users": 9,
    "stable-diffusion-3.5-medium": 9, "Ovis-Image-7B": 9, "ERNIE-Image": 9,
}  # fmt: skip
"""Released models and the tokens of their prompts."""
CLIPS = ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.2-TI2V-5B-Diffusers")
HUNYUAN = {
    "HunyuanVideo": hunyuan_video,
    "HunyuanVideo-1.5-Diffusers-480p_t2v": hunyuan_video15,
    "HunyuanVideo-1.5-Diffusers-480p_i2v": hunyuan_video15,
}
STEPS = 3


def shallow(c):
    """The same network of few blocks."""
    fewer = {
        name: n
        for name, n in (("num_layers", 2), ("num_single_layers", 1), ("n_layers", 1))
        if hasattr(c, name)
    }
    if getattr(c, "dual_attention_layers", ()):
        fewer["dual_attention_layers"] = (0,)
    return replace(c, **fewer)


def hunyuan_case(name: str) -> cases.Picture:
    """Five frames of HunyuanVideo at a quarter of its size, or of HunyuanVideo-1.5."""
    module, row = HUNYUAN[name], registry.named(name)
    entries = REPOSITORIES[row.name]["components"]["transformer"]["config"]
    c = module.Config(**typed(module.Config, entries))
    size, values = (2, 30, 52), prod(module.patch(c)) * c.out_channels
    positions = module.positions(c, size, "meta")
    inputs = {"text": torch.empty(1, 12, c.text_embed_dim, device="meta"), "positions": positions}
    if module is hunyuan_video:
        inputs["pooled"] = torch.empty(1, c.pooled_projection_dim, device="meta")
        inputs["guidance"] = torch.empty(1, device="meta")
    else:
        inputs["concat"] = torch.empty(1, len(positions), c.in_channels - c.out_channels, device="meta")
    if row.images[0]:
        inputs["image"] = torch.empty(1, VIEWS, c.image_embed_dim, device="meta")
    x = torch.empty(1, len(positions), values, device="meta")
    return cases.Picture(name, module.FAMILY, shallow(c), inputs, x)


VIEWS = 729
"""SigLIP's tokens of an image."""


@cache
def asked(name: str) -> tuple[cases.Picture, CostModel, Work]:
    """A released model of few blocks, what it is told, and the same in the words of `cost`."""
    if name in CLIPS:
        case = cases.released(name, frames=5)
        c = shallow(case.config)
        inputs = {
            "text": torch.empty(1, 12, c.text_dim, device="meta"),
            "positions": wan.positions(c, case.size, "meta"),
        }
        made = cases.Picture(
            name, wan.FAMILY, c, inputs, torch.empty(1, case.tokens, c.out_channels * 4, device="meta")
        )
    elif name in HUNYUAN:
        made = hunyuan_case(name)
    else:
        made = cases.picture(name, PICTURES[name])
        made = made._replace(config=shallow(made.config))
    net = workload.cost_model(made.family, made.config)
    words = sum(made.inputs[kind].shape[1] for kind in ("image", "text") if kind in made.inputs)
    return made, net, Work(made.x.shape[1], words, steps=STEPS)


def readied(name: str, plan: Plan, branches: int = 1):
    """A step of the network on this plan, on the meta device: (weights, branches, latents, the step)."""
    made, net, _ = asked(name)
    blocks = [prefix for _, prefix in made.family.blocks(made.config)] if plan.group("shard").size > 1 else ()
    flat = {
        row.name: torch.empty(
            row.shape, device="meta", dtype=torch.float32 if row.float32 else torch.bfloat16
        )
        for row in local_rows(net.rows, plan, blocks)
    }
    table = solvers.from_scheduler_config(cases.SCHEDULER, STEPS)
    network = Network(made.family, made.config, plan, torch.bfloat16)
    return loop.hoist(network, flat, [made.inputs] * branches, table), made


def run(name: str, plan: Plan, branches: int = 1, *modes):
    """One evaluation, under these modes."""
    hoisted, made = readied(name, plan, branches)
    shares = plan.group("ring").size * plan.group("ulysses").size
    x = made.x[:, : -(-made.x.shape[1] // shares)]
    step = loop.Step(x, x, x)
    at = tuple(
        Branch(request, {at: {n: t[0] for n, t in rows.items()} for at, rows in steps.items()})
        for request, steps in hoisted[1]
    )
    predict = loop.predictor(Network(made.family, made.config, plan, torch.bfloat16))
    with torch.no_grad(), modes[0]:
        predict(hoisted.weights, x, step, at, {})
    return hoisted


NAMES = (*PICTURES, *CLIPS, *HUNYUAN)
QUICK = ("FLUX.1-dev", CLIPS[0])
"""Blocks of two streams and of one, and cross-attention."""


@pytest.mark.parametrize("name", NAMES)
def test_the_operations_of_a_step_are_those_that_torch_counts(name):
    with FlopCounterMode(display=False) as counter:
        pass
    run(name, Plan(), 1, counter)
    _, net, work = asked(name)
    assert cost.step_flops(net, Layout(), work) == counter.get_total_flops() > 1e9


class Alive(TorchDispatchMode):
    """The most bytes that tensors made here held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        known = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        result = fn(*args, **(kwargs or {}))
        self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
        for x in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in known:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_activations_and_hoisted_tensors_are_about_those_of_a_run(name, monkeypatch):
    monkeypatch.setitem(
        BACKENDS, "sdpa", lambda q, *_: torch.empty_like(q)
    )  # a kernel keeps no scores, and there is none for meta
    alive = Alive()
    hoisted = run(name, Plan(), 2, alive)
    made, net, work = asked(name)
    guided = replace(work, branches=2)
    assert cost.activation_bytes(net, Layout(), guided, 2) == pytest.approx(alive.most, rel=0.25)
    tensors = [
        tensor
        for branch in hoisted.branches
        for tree in branch
        for entries in tree.values()
        for tensor in entries.values()
    ]
    kept = sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}.values())
    # SD3 has rows of a position table where others have rope tables, ERNIE-Image has each angle twice.
    left_out = {sd3.FAMILY: net.width * 2 - net.head_width * 4, ernie.FAMILY: net.head_width * 4}.get(
        made.family, 0
    )
    assert cost.hoisted_bytes(net, Layout(), guided, 2) == pytest.approx(
        kept - 2 * work.image * left_out, rel=0.1
    )


AUTOENCODERS = {
    "kl": (kl, {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2}, 1, 1),
    "Wan2.1": (wan_vae, {}, 9, 1),
    "Wan2.1, an image": (wan_vae, {}, 1, 1),
    "Wan2.1, in one pass": (wan_vae, {}, 9, 3),
    "HunyuanVideo": (hunyuan, {}, 9, 3),
    "HunyuanVideo-1.5": (hunyuan15, {}, 9, 1),
    "HunyuanVideo-1.5, in one pass": (hunyuan15, {}, 9, 3),
    "Wan2.2": (wan_vae, {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True,
    "in_channels": 12, "out_channels": 12,
                         "patch_size": 2, "scale_factor_spatial": 16}, 17, 2),
    "LTX-2": (ltx2_video, {"decoder_causal": False, "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8}, 25, 4),
    "LTX-2 with zeros at the edges": (ltx2_video, {"decoder_causal": False, "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8, "decoder_spatial_padding_mode": "zeros"}, 25, 4),
}  # fmt: skip
"""Kind -> (module, fields of its config, frames, latent frames in a pass)."""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in AUTOENCODERS),
        *((kind, torch.bfloat16) for kind in ("kl", "Wan2.1", "Wan2.1, an image", "Wan2.1, in one pass")),
    ],
)
def test_the_peak_of_decoding_is_about_that_of_a_run(kind, dtype, monkeypatch):
    monkeypatch.setitem(BACKENDS, "sdpa", lambda q, *_: torch.empty_like(q))
    module, fields, frames, passes = AUTOENCODERS[kind]
    if module is kl:
        fields = fields | {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
    c, alive = module.Config(**fields), Alive()
    if module is wan_vae:
        c = replace(c, latents_mean=(0.0,) * c.z_dim, latents_std=(1.0,) * c.z_dim)
    stride = c.scale_factor_spatial
    new = partial(torch.empty, device="meta", dtype=dtype)
    weights = Weights({row.name: new(row.shape) for row in module.spec(c)})
    z = new(1, c.z_dim, (frames - 1) // c.scale_factor_temporal + 1, 256 // stride, 192 // stride)
    with torch.no_grad(), alive:
        module.decode(c, weights, z, chunk=passes)
    expected = workload.decode_bytes(module.FAMILY, c, frames, 256, 192, passes, 1, dtype.itemsize)
    assert expected == pytest.approx(alive.most, rel=0.25 if kind == "Wan2.2" else 0.1)


# --- what is sent ---


class Sent(TorchDispatchMode):
    """Bytes handed to functional collectives, by the name of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.namespace == "_c10d_functional" and "wait" not in fn.__name__:
            self.bytes[args[-1]] += args[0].nbytes
        return fn(*args, **(kwargs or {}))


LAYOUTS = (
    Layout(ulysses=2), Layout(ulysses=5), Layout(ring=2), Layout(ring=3, ulysses=2), Layout(tp=2),
    Layout(tp=2, ulysses=2), Layout(cfg=2),
    Layout(cfg=2, ulysses=2), Layout(ring=3, fsdp=True), Layout(cfg=2, tp=2, fsdp=True),
)  # fmt: skip


COVERING = (Layout(ulysses=5), Layout(ring=3, ulysses=2), Layout(cfg=2, tp=2, fsdp=True))
"""Every axis at least once, with heads that five does not divide."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            layout,
            marks=() if name in QUICK else pytest.mark.slow,
            id="-".join(map(str, (name, *layout.sizes[1:], layout.fsdp))),
        )
        for name in NAMES
        for layout in (LAYOUTS if name in QUICK else COVERING)
    ],
)
def test_the_bytes_of_a_step_are_those_that_collectives_are_handed(name, layout):
    _, net, work = asked(name)
    live = tuple((axis, Group(axis, n, 0)) for axis, n in zip(AXES, layout.sizes, strict=True) if n > 1)
    live += (("shard", Group("fsdp", cost.shard_count(layout), 0)),) * layout.fsdp
    sent, guided = Sent(), replace(work, branches=2)
    run(name, Plan(groups=live), 2, sent)
    assert dict(sent.bytes) == cost.step_bytes(net, layout, guided)


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B-Diffusers", "FLUX.2-dev", "stable-diffusion-3.5-medium"])
@pytest.mark.parametrize(("tp", "others"), [(1, 3), (2, 3), (4, 1)])
def test_weights_are_those_that_a_rank_keeps(name, tp, others):
    made, net, _ = asked(name)
    blocks = [prefix for _, prefix in made.family.blocks(made.config)]
    live = Plan(groups=(("tp", Group("tp", tp, 0)), ("shard", Group("shard", others, 0))))
    held = [row for row in local_rows(net.rows, live, blocks if others > 1 else ())]
    whole = 2 * max(cost.weight_bytes(rows, 2, tp) for rows in net.blocks) if others > 1 else 0
    layout = Layout(tp=tp, ulysses=others, fsdp=others > 1)
    assert cost.denoiser_bytes(net, layout, 2) - whole == sum(
        row.numel * (4 if row.float32 else 2) for row in held
    )
    assert cost.denoiser_bytes(net, layout, 2, experts=2) - whole == 2 * (
        cost.denoiser_bytes(net, layout, 2) - whole
    )
