"""Comparing a network with its reference: every parameter redrawn, float64 on both sides, the reference's roundings taken out."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinydiff.parallel.plan import Row


class doubles(TorchFunctionMode):
    """A context, `with doubles():`, in which a float64 tensor stays float64 where code asks for float32.

    The references compute some steps in float32 whatever the network's type, to spare half types the rounding: diffusers'
    FP32LayerNorm, `temb.float()` and `hidden_states.float()` of Wan's blocks, WanUpsample, and `to(torch.float32)` of T5's norm.
    In float64 that is a rounding of the reference's own; without it the two sides agree to 1e-10. Only the reference runs in here.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def randomised(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Redraw every entry of the module's state in float64, scales near 1 and all else near 0, and return the state dict.

    Fresh modules hold zeros and ones in biases, norms and tables, which would hide a weight that is never read. Matrices and
    kernels are divided by the square root of their fan-in, so that deep stacks neither vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    state = module.double().eval().state_dict()
    drawn: dict[int, Tensor] = {}  # a tied weight has two names and one memory
    for name, old in state.items():
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        scale = name.endswith("gamma") or (name.endswith("weight") and old.ndim == 1)
        table = old.ndim == 3 or old.ndim == 1
        fan_in = 1 if table or scale else max(1, old[0].numel())
        value = 1 + 0.3 * noise if scale else noise * (0.3 if table else 1) / fan_in**0.5
        state[name] = drawn.setdefault(old.data_ptr(), value)
    module.load_state_dict(state)
    return state


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shapes(items: Iterable[Row] | Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape, of spec rows or of a state dict. Two rows of one name are an error."""
    if isinstance(items, Mapping):
        return {name: tuple(tensor.shape) for name, tensor in items.items()}
    rows = list(items)
    table = {row.name: row.shape for row in rows}
    assert len(table) == len(rows), "the spec names a weight twice"
    return table


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert equal shape and type and values within `tolerance`, absolutely. The reference must be finite, not constant, of order one."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"types differ: {actual.dtype} and {expected.dtype}"
    spread = expected.double().std().item()  # not a number where a value is not
    assert 1e-2 < spread < 1e3, f"the reference is degenerate: its deviation is {spread:.1e}"
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"differs by {error:.1e}, allowed is {tolerance:.0e}"


class Recording(dict):
    """A flat weight dict that remembers which names were read."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        super().__init__(flat)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        if name in self:
            self.read.add(name)
        return super().get(name, default)
