"""The step cache over several ranks: each rank decides as one rank does."""

from functools import partial

import pytest
import torch

from tests.parallel import test_compiled
from tests.parallel.pool import on_ranks
from tests.parallel.test_families import LAYOUTS, denoised, plan_of
from tests.parity import close
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan
from tinydiff.sampling import loop, step_cache

LIMITS = step_cache.Limits(torch.tensor(1e9), torch.tensor(0), torch.tensor(9))
"""The second of two steps takes over the first one's result."""
FAMILIES = ("Wan, text", "FLUX.1", "SD3", "LTX-2")


def cached(name, plan, fsdp=False):
    run = partial(loop.eager_denoise, cached_after=1)
    return denoised(name, plan, fsdp, run=run, limits=LIMITS)


def all_cached(layout):
    return {name: cached(name, plan_of(layout), layout.fsdp) for name in FAMILIES}


@pytest.mark.parametrize("case", ["tp x ulysses", "full sharding"])
def test_every_layout_gives_what_one_rank_gives(case):
    alone = {name: cached(name, Plan()) for name in FAMILIES}
    for rank in on_ranks(LAYOUTS[case].size, all_cached, LAYOUTS[case]):
        for name, want in alone.items():
            close(rank[name], want)
    for name, want in alone.items():
        assert not torch.allclose(want, denoised(name, Plan()))


@pytest.mark.slow
def test_one_graph_serves_every_request():
    test_compiled.check(Layout(ulysses=2), "flux", guided=False, limits=LIMITS)
