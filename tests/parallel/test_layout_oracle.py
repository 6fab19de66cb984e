"""A whole family on DTensor activations, eagerly: torch decides every communication, our oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import TABLE, branches, denoised, plan_of, weights
from tests.parity import close
from tinydiff.models.recipe import Net
from tinydiff.parallel import sequence
from tinydiff.parallel.dtensors import real
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.placements import placements, size, weight_mesh
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.sampling import guidance, loop

NAME = "SD3"
LAYOUTS = [Layout(tp=2), Layout(ulysses=2)]
"""Each alone: torch needs a minute to plan both on four ranks. tests/parallel/test_families.py joins them."""


def on_dtensors(layout):
    """The tokens after two steps with guidance: weights lie as in our plan, tokens are sharded over ulysses.

    The code of the family is that of one rank. Where an operator needs other placements torch redistributes.
    """
    d = DENOISERS[NAME]
    d = replace(d, config=replace(d.config, out_channels=d.config.in_channels))  # as in `denoised`
    where, rows = weight_mesh(layout, "dit"), tuple(d.family.spec(d.config))
    axes = [axis for axis in where.axes if size(layout, axis) > 1]
    mesh = init_device_mesh("cpu", tuple(size(layout, axis) for axis in axes), mesh_dim_names=tuple(axes))
    along = [where.axes.index(axis) for axis in axes]
    plan = {name: [real(each[i]) for i in along] for name, each in placements(rows, where).items()}
    everywhere = [Replicate() for _ in axes]
    by_tokens = [Shard(1) if axis == "ulysses" else Replicate() for axis in axes]

    def place(x, on):
        return distribute_tensor(x, mesh, on, src_data_rank=None)

    asked = d.ask(d.config)
    whole = weights(d.family, d.config, torch.float64)
    placed = {name: place(x, plan[name]) for name, x in whole.items()}
    net = Net(d.family, d.config, Plan(), placed, torch.float64)
    # Constants that the code makes are the same on all ranks. DTensor knows no CPU kernel of attention.
    with torch.no_grad(), implicit_replication(), sdpa_kernel(SDPBackend.MATH):
        inputs = [
            {name: place(x, everywhere) for name, x in branch.items()}
            for branch in branches(d.family, asked.inputs, torch.float64)
        ]
        hoisted = loop.hoist(net.network, net.weights, inputs, TABLE)
        x = place(asked.tokens.to(torch.float64), by_tokens)
        eager = loop.eager_denoise(net.network, guidance.KINDS[d.family.guidance])
        *_, last = loop.run(eager, TABLE, x, lambda _: hoisted)
        assert isinstance(last.x, DTensor)
        return last.x.full_tensor(), last.x.redistribute(placements=by_tokens).to_local()


def both(layout):
    """(torch's tokens, all and this rank's; ours, all and this rank's)"""
    plan = plan_of(layout)
    tokens, shard = on_dtensors(layout)
    ours = denoised(NAME, plan)
    return tokens, shard, ours, sequence.shard(plan, ours, 1)


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="before torch 2.13 DTensor splits no batch of heads"
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_our_layout_computes_what_dtensors_compute(layout):
    alone = denoised(NAME, Plan())
    for tokens, shard, ours, our_shard in on_ranks(layout.size, both, layout):
        close(tokens, alone)
        close(ours, tokens)
        close(our_shard[:, : shard.shape[1]], shard)  # ours is padded by at most one token
