"""Why the loop runs on local tensors: a DTensor does not pass through torch's loop operator."""

import torch
from torch._higher_order_ops.while_loop import while_loop
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

from tests.parallel.pool import on_ranks

TELL = """\
torch's while_loop takes DTensors now. The loop could then run on DTensor activations: in
tinydiff/sampling/loop.py pass `net.dtensors` instead of local tensors, let placements take the place of the
moves of parallel/moves.py, compare steps per second (benchmarks/), and delete this test. If only newer
releases take them, raise the oldest torch of pyproject.toml first."""


def three_times(i, x):
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (i, x))


def looped():
    """(what a local tensor becomes in the compiled loop, what a DTensor's local tensor does or why not)."""
    compiled = torch.compile(three_times, backend="eager", fullgraph=True)
    x = torch.ones(2, 3)
    local = compiled(torch.tensor(0), x)[1]
    placed = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])
    try:
        after = compiled(torch.tensor(0), placed)[1]
    except (RuntimeError, AssertionError) as error:
        return local, f"{type(error).__name__}: {error}"
    return local, after.to_local() if isinstance(after, DTensor) else after


def test_a_dtensor_does_not_pass_through_the_loop_operator():
    [(local, refused)] = on_ranks(1, looped)
    assert torch.equal(local, torch.full((2, 3), 8.0))
    assert isinstance(refused, str), TELL
    assert "wrapper subclass" in refused or "DTensor" in refused, refused
