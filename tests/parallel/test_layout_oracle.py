"""A whole family on DTensor activations, eagerly: torch decides every communication, and is the oracle of ours."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.parallel.pool import on_ranks
from tests.parallel.test_families import TABLE, branches, denoised, plan_of, weights
from tests.parity import close
from tinydiff.models.recipe import Net
from tinydiff.parallel import sequence
from tinydiff.parallel.dtensors import real
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.placements import placements, weight_mesh
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.sampling import guidance, loop

NAME, LAYOUT = "SD3", Layout(ulysses=2, tp=2)


def on_dtensors():
    """The tokens after two steps with guidance: weights lie as in our plan, tokens are sharded over ulysses.

    The code of the family is that of one rank. Where an operator needs other placements torch redistributes.
    """
    d = DENOISERS[NAME]
    d = replace(d, config=replace(d.config, out_channels=d.config.in_channels))  # as in `denoised`
    mesh = init_device_mesh("cpu", (LAYOUT.ulysses, LAYOUT.tp), mesh_dim_names=("ulysses", "tp"))
    where, rows = weight_mesh(LAYOUT, "dit"), tuple(d.family.spec(d.config))
    along = [where.axes.index(axis) for axis in ("ulysses", "tp")]
    plan = {name: [real(each[i]) for i in along] for name, each in placements(rows, where).items()}

    def place(x, on):
        return distribute_tensor(x, mesh, on, src_data_rank=None)

    everywhere, asked = [Replicate(), Replicate()], d.ask(d.config)
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
        x = place(asked.tokens.to(torch.float64), [Shard(1), Replicate()])
        eager = loop.eager_denoise(net.network, guidance.KINDS[d.family.guidance])
        *_, last = loop.run(eager, TABLE, x, lambda _: hoisted)
        assert isinstance(last.x, DTensor)
        return last.x.full_tensor(), last.x.redistribute(placements=[Shard(1), Replicate()]).to_local()


def both():
    """(torch's tokens, all and this rank's; ours, all and this rank's)"""
    plan = plan_of(LAYOUT)
    tokens, shard = on_dtensors()
    ours = denoised(NAME, plan)
    return tokens, shard, ours, sequence.shard(plan, ours, 1)


def test_our_layout_computes_what_dtensors_compute():
    alone = denoised(NAME, Plan())
    for tokens, shard, ours, our_shard in on_ranks(LAYOUT.size, both):
        close(tokens, alone)
        close(ours, tokens)
        close(our_shard, shard)
