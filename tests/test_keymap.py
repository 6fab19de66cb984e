"""Key maps: from stored keys to rows and back."""

import pytest
import torch

from tinydiff.io.weights import exported
from tinydiff.keymap import (
    AS_IS,
    KeyMap,
    Run,
    also,
    fused,
    joined,
    moved,
    runs,
    stored_rows,
    stored_shapes,
    swapped,
    transposed,
    under,
    unread,
)
from tinydiff.parallel.plan import Row

LINES = (
    moved("blocks.0.special", "blocks.0.own"),
    *under(
        "blocks.*",
        "layers.*",
        fused("qkv", "q", "k", "v"),
        joined(("up", "gate"), "proj"),
        moved("norm.scale", "norm.weight"),
        also("norm.weight", "norm.weight"),
        moved("sub.*.x", "part.*.y"),
    ),
    swapped("mod", "modulation"),
    transposed("turned", "matrix.weight"),
    moved("table", "embedding", lead=1, ones=2),
    *unread("old"),
)
KEYS = KeyMap(LINES, "net.")
ROWS = {
    row.name: row
    for row in (
        *(
            Row(f"layers.3.{name}.weight", (size, 5))
            for name, size in (("q", 6), ("k", 2), ("v", 4), ("proj", 8))
        ),
        Row("layers.3.norm.weight", (5,)),
        Row("layers.3.part.7.y.weight", (2,)),
        Row("modulation.bias", (6,)),
        Row("matrix.weight", (3, 4)),
        Row("embedding", (2, 3)),
        Row("scale", ()),
        Row("blocks.0.own.bias", (1,)),
    )
}
STORED = {
    "net.blocks.3.qkv.weight": (12, 5),
    "net.blocks.3.up.weight": (4, 5),
    "net.blocks.3.gate.weight": (4, 5),
    "net.blocks.3.norm.scale": (5,),
    "net.blocks.3.sub.7.x.weight": (2,),
    "net.mod.bias": (6,),
    "net.turned": (4, 3),
    "net.table": (1, 2, 3, 1, 1),
    "net.scale": (),
    "net.blocks.0.special.bias": (1,),
}


def test_the_keys_of_rows_and_their_shapes():
    assert stored_rows(KEYS, ROWS.values()) == STORED
    assert stored_rows(AS_IS, ROWS.values()) == {name: row.shape for name, row in ROWS.items()}


def test_both_directions_agree():
    for key, shape in STORED.items():
        match = KEYS.of_key(key)
        assert match is not None and stored_shapes(match, ROWS)[key] == shape
        for name in match.rows:
            assert KEYS.of_row(name) == match
    assert {name for key in STORED for name in KEYS.of_key(key).rows} == set(ROWS)


def test_what_is_unread_of_another_component_or_another_spelling():
    assert KEYS.of_key("net.old.weight").rows == () and KEYS.row("net.old") is None
    assert KEYS.of_key("vae.scale") is None and KEYS.row("vae.scale") is None
    assert KEYS.of_key("net.older.weight").rows == ("older.weight",)  # a name is not the beginning of another
    assert KEYS.row("net.blocks.3.norm.weight") == "layers.3.norm.weight"  # read so too, written otherwise
    assert KEYS.of_row("layers.3.norm.weight").keys == ("net.blocks.3.norm.scale",)
    assert KEYS.row("net.blocks.x.norm.scale") == "blocks.x.norm.scale"  # `*` is a number
    with pytest.raises(ValueError, match="too many values"):
        KEYS.row("net.blocks.3.qkv.weight")


def test_runs_are_where_the_rows_lie():
    def of(key):
        return runs(KEYS.of_key(key), ROWS)

    assert of("net.blocks.3.qkv.weight") == {
        "layers.3.q.weight": (Run("net.blocks.3.qkv.weight", 0, 0, 6),),
        "layers.3.k.weight": (Run("net.blocks.3.qkv.weight", 6, 0, 2),),
        "layers.3.v.weight": (Run("net.blocks.3.qkv.weight", 8, 0, 4),),
    }
    assert of("net.blocks.3.gate.weight") == {
        "layers.3.proj.weight": (
            Run("net.blocks.3.up.weight", 0, 0, 4),
            Run("net.blocks.3.gate.weight", 0, 4, 4),
        ),
    }
    assert of("net.mod.bias") == {
        "modulation.bias": (Run("net.mod.bias", 0, 3, 3), Run("net.mod.bias", 3, 0, 3))
    }


def test_rows_of_other_widths_cannot_lie_in_one_tensor():
    rows = {name: Row(name, (2, 2 + i)) for i, name in enumerate("qkv")}
    with pytest.raises(ValueError, match="q and k and v differ in more than their first dimension"):
        runs(KeyMap((fused("qkv", "q", "k", "v"),)).of_key("qkv"), rows)


def test_what_is_written():
    weights = {name: torch.arange(float(max(1, row.numel))).reshape(row.shape) for name, row in ROWS.items()}
    stored = exported(weights, ROWS.values(), KEYS)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == STORED
    assert stored["net.mod.bias"].tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(stored["net.turned"], weights["matrix.weight"].T)
    parts = [weights[f"layers.3.{name}.weight"] for name in "qkv"]
    assert torch.equal(stored["net.blocks.3.qkv.weight"], torch.cat(parts))
    halves = [stored[f"net.blocks.3.{name}.weight"] for name in ("up", "gate")]
    assert torch.equal(torch.cat(halves), weights["layers.3.proj.weight"])
