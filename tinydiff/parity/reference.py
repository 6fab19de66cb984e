"""Running a reference so that it can be compared with.

Every parameter is redrawn, its own roundings are taken out, and its layers are overheard.

Only the modules of this directory import diffusers and transformers: they come with the extra of that name,
and nothing that makes an image needs them.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinydiff.entries import EntryDict
from tinydiff.ops.network import Config
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError

Foreign = Any
"""A network, config or output of a reference library, which has no types here."""

BOUND = 1e-10
"""The largest error that is none: in float64 rounding leaves about 1e-15 a layer."""

LIBRARIES = ("diffusers", "transformers")


class Case(NamedTuple):
    """A tiny network and its reference, on the same inputs."""

    reference: Callable[[], nn.Module]
    spec: Callable[[], Iterable[Row]]
    rename: Callable[[str], str | None]
    """The reference's name of a weight -> the spec's."""
    theirs: Callable[[nn.Module], dict[str, Tensor]]
    """Stage -> what the reference computes there."""
    ours: Callable[[Weights], Iterator[tuple[str, Tensor]]]
    """The same stages in order, one after the other."""


class Stage(NamedTuple):
    """What a comparison found at one stage.

    error: the largest difference over the largest value of the reference; inf where it failed.
    """

    name: str
    error: float
    note: str = ""


class doubles(TorchFunctionMode):
    """A context, `with doubles():`, in which a float64 tensor stays float64 where code asks for float32.

    The references compute some steps in float32 whatever the network's type, to spare half types the
    rounding: diffusers' FP32LayerNorm, `temb.float()` and `hidden_states.float()` of Wan's blocks,
    WanUpsample, and `to(torch.float32)` of T5's norm. In float64 that is a rounding of the reference's own;
    without it the two sides agree to 1e-10. Only the reference runs in here.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {
                name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()
            }
        return func(*args, **kwargs)


def randomised(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Redraw every entry of the module's state in float64, and return the state dict.

    Scales are drawn near 1, and all else near 0.

    Fresh modules hold zeros and ones in biases, norms and tables, which would hide a weight that is never
    read. Matrices and kernels are divided by the square root of their fan-in, so that deep stacks neither
    vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    state = module.double().eval().state_dict()
    drawn: dict[int, Tensor] = {}  # a tied weight has two names and one memory
    for name, old in state.items():
        if not old.is_floating_point():
            continue  # a counter
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        scale = name.endswith("gamma") or (name.endswith("weight") and old.ndim == 1)
        table = old.ndim in (0, 1, 3)
        fan_in = 1 if table or scale else max(1, old[0].numel())
        value = 1 + 0.3 * noise if scale else noise * (0.3 if table else 1) / fan_in**0.5
        value = value.abs() + 0.01 if name.endswith("running_var") else value
        state[name] = drawn.setdefault(old.data_ptr(), value)
    module.load_state_dict(state)
    return state


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def library(name: str) -> ModuleType:
    """diffusers or transformers. Raises UserError, one sentence, where it is not installed."""
    try:
        return (
            importlib.import_module("diffusers")
            if name == "diffusers"
            else importlib.import_module("transformers")
        )
    except ImportError as error:
        raise UserError(
            "parity",
            f"parity: {name}, the reference, is not installed; pip install 'tinydiff[diffusers]'",
        ) from error


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Name of a package -> its installed version, or None."""

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: of(name) for name in names}


def built(kind: Foreign, config: Config) -> nn.Module:
    """A class of diffusers from one of our configs: the fields that it knows."""
    known = inspect.signature(kind.__init__).parameters
    return kind(
        **{name: list(v) if isinstance(v, tuple) else v for name, v in vars(config).items() if name in known}
    )


@contextmanager
def overheard(module: nn.Module, names: Iterable[str]) -> Generator[EntryDict]:
    """A dict that fills with what the submodules of these names return while the reference runs."""
    heard: EntryDict = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: heard.__setitem__(name, output)

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def distance(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """(the largest difference over the largest value of the reference, what is wrong besides)."""
    if ours.shape != theirs.shape:
        return math.inf, f"shapes differ: ours {tuple(ours.shape)}, the reference's {tuple(theirs.shape)}"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return (error, "") if math.isfinite(error) else (math.inf, "values that are no numbers")


def prepared(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(stage -> the reference's values, the same weights under the spec's names)."""
    reference = case.reference()
    state = randomised(reference, 1)
    named = {name: tensor for key, tensor in state.items() if (name := case.rename(key)) is not None}
    with doubles(), torch.no_grad():
        return case.theirs(reference), named


def compared(case: Case, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[Stage]:
    """Each stage of our network with these weights against the reference's values.

    The names and shapes of the weights come first.
    """
    rows = {row.name: row.shape for row in case.spec()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    odd = sorted(name for name in rows.keys() | given.keys() if rows.get(name) != given.get(name))
    note = f"{odd[0]}: ours {rows.get(odd[0])}, the reference's {given.get(odd[0])}" if odd else ""
    yield Stage("weights", math.inf if odd else 0.0, note)
    with torch.no_grad():
        for name, values in case.ours(Weights(weights, dtype=torch.float64)):
            yield Stage(name, *distance(values, expected[name]))


def stages(case: Case) -> list[Stage]:
    """The whole comparison. Whatever goes wrong, a library of another version say, is its last stage."""
    found: list[Stage] = []
    try:
        found.extend(compared(case, *prepared(case)))
    except UserError:
        raise
    except Exception as error:
        found.append(Stage("running", math.inf, f"{type(error).__name__}: {error}".splitlines()[0]))
    return found


def first_difference(found: Iterable[Stage]) -> Stage | None:
    """The first stage beyond the bound: what is wrong sits there, what comes after is what it leads to."""
    return next((stage for stage in found if not stage.error <= BOUND), None)
