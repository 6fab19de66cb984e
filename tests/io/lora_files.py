"""LoRA files of every layout, with random factors, and what they must do to a network's weights."""

from functools import cache

import torch
from safetensors.torch import save_file

from tests.models.test_layouts import CONVERTED, drawn
from tinydiff.io.lora import Component, read_adapter
from tinydiff.keymap import AS_IS, KeyMap, stored_rows
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts.recognise import key_maps

RANK = 2
FAMILIES = [name for name in CONVERTED if RECORDS[CONVERTED[name][0]].role == "dit"]


@cache
def network(name):
    """A narrow network: (component, key map of the original layout, what makes the spec's names of them)."""
    layout, c, rows, _ = drawn(name)
    record = RECORDS[layout.class_name]
    component = Component("dit", {row.name: row for row in rows}, key_maps(record, c))
    return component, KeyMap(layout.lines(c)), lambda stored: CONVERTED[name][3](dict(stored), c)


def stored(component, keys=AS_IS):
    """The shapes of the tensors in a file of the network."""
    return stored_rows(keys, component.rows.values())


def modules(shapes):
    """The names of the products in a file."""
    return [
        key.removesuffix(".weight")
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    ]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(shapes, rank=RANK):
    """Module -> (a, b), in the dimensions that trainers give to those of convolutions."""
    pairs = {}
    for i, module in enumerate(modules(shapes)):
        out, *into = shapes[f"{module}.weight"]
        ones = [1] * (len(into) - 1)
        pairs[module] = randn(rank, *into, seed=2 * i), randn(out, rank, *ones, seed=2 * i + 1)
    return pairs


def kohya(pairs, prefix="lora_unet_"):
    """The keys of kohya's trainers, each layer with its own alpha."""
    tensors = {}
    for i, (module, (a, b)) in enumerate(pairs.items()):
        stem = prefix + module.replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": torch.tensor(1.0 + i % 3),
        }
    return tensors


def dotted(pairs, prefix="diffusion_model.", ends=("lora_A", "lora_B"), alpha=True):
    """The keys of trainers that keep the dots of a layer's name."""
    tensors = {}
    for i, (module, (a, b)) in enumerate(pairs.items()):
        tensors |= {f"{prefix}{module}.{ends[0]}.weight": a, f"{prefix}{module}.{ends[1]}.weight": b}
        if alpha:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(1.0 + i % 3)
    return tensors


def product(a, b, shape):
    return (b.flatten(1) @ a.flatten(1)).reshape(shape)


def deltas(component, keys, to_rows, pairs, scale=1.0):
    """Row -> what pairs of stored names must add, by the reference's converter of weights; it is linear."""
    shapes = stored(component, keys)
    whole = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    for module, (a, b) in pairs.items():
        whole[f"{module}.weight"] = scale * product(a, b, shapes[f"{module}.weight"])
    found = to_rows(whole)
    return {name: found[name] for name in component.rows if found[name].any()}


def read(tmp_path, tensors, components, metadata=None, **options):
    """The adapter that a file of these tensors is."""
    file = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    if isinstance(components, Component):
        components = {"transformer": components}
    return read_adapter(file, components, **options)


def added(component, differences, strength=1.0):
    """Row -> what differences add to weights of zero."""
    return {
        name: each.apply(torch.zeros(component.rows[name].shape, dtype=torch.float64), strength)
        for name, each in differences.items()
    }


def equal(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    wrong = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    assert {name: error for name, error in wrong.items() if not error <= tolerance} == {}
