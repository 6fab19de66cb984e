import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parallel.pool import on_ranks
from tinydiff.io import weights as module
from tinydiff.io.weight_sources import weight_files
from tinydiff.io.weights import exported, load_weights, save_weights
from tinydiff.keymap import AS_IS, KeyMap, also, fused, joined, moved, swapped, transposed, under, unread
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Group, Plan, Row, linear_rows, norm_rows, repeat
from tinydiff.parallel.ranks import make_ranks
from tinydiff.parallel.shards import Box, shard_weights
from tinydiff.records import UserError

ROWS = (
    Row("blocks.0.weight", (6, 4)),
    Row("blocks.0.bias", (6,)),
    Row("norm.weight", (6,), float32=True),
    Row("scale", ()),
    Row("empty", (0, 3)),
    Row("embed", (50, 4)),
)


def draw(rows=ROWS, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {row.name: torch.randn(row.shape, generator=generator).to(dtype) for row in rows}


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], count: int = 3, stem: str = "diffusion_pytorch_model"
) -> list[Path]:
    names = list(tensors)
    files, index = [], {}
    for shard in range(count):
        name = f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in names[shard::count]}
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
        files.append(folder / name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


def refused(folder: Path, rows=ROWS, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(folder, rows, torch.float32, **options)
    assert caught.value.field == "model_path"
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_types(tmp_path, monkeypatch, sharded, stored, target):
    monkeypatch.setattr(module, "BUDGET", 100)  # bytes: tensors are cut and files reopened
    tensors = draw(dtype=stored)
    if sharded:
        write_shards(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path, ROWS, target)
    assert list(loaded) == [row.name for row in ROWS]
    for row in ROWS:
        dtype = torch.float32 if row.float32 else target
        assert loaded[row.name].dtype == dtype and tuple(loaded[row.name].shape) == row.shape
        assert torch.equal(loaded[row.name], tensors[row.name].to(dtype)), row.name


def test_streamed_pieces_stay_within_the_budget():
    at = module.Stored(Path("x"), "k", "F32", (77, 5, 4))
    pieces = list(module._pieces(at, Box((0, 2, 0), (0, 0, 0), (77, 2, 4)), 1000))
    covered = [row for piece in pieces for row in range(77)[piece.source[0]]]
    assert covered == list(range(77))
    assert len(pieces) == 7 and all(piece.shape[0] * 5 * 4 * 4 <= 1000 for piece in pieces)
    assert all(
        piece.source[1:] == (slice(2, 4), slice(0, 4)) and piece.target[1:] == (slice(0, 2), slice(0, 4))
        for piece in pieces
    )


def test_pieces_have_rows_for_every_rank_that_shares_them():
    at = module.Stored(Path("x"), "k", "F32", (77, 50))
    sizes = [piece.shape[0] for piece in module._pieces(at, Box((0, 0), (0, 0), at.shape), 1000, 4)]
    assert sizes == [4] * 19 + [1]
    assert [piece.shape[0] for piece in module._pieces(at, Box((0, 0), (0, 0), at.shape), 100, 4)] == sizes


def test_a_table_behind_a_dimension_of_one_is_cut_too():
    at = module.Stored(Path("x"), "k", "F32", (1, 77, 5, 4))
    pieces = list(module._pieces(at, Box((0,) * 4, (0,) * 4, at.shape), 1000))
    assert [piece.source[1] for piece in pieces] == [slice(at, min(at + 12, 77)) for at in range(0, 77, 12)]
    assert all(piece.shape[0] == 1 and piece.shape[2:] == (5, 4) for piece in pieces)


def test_no_cast_on_cpu_maps_the_file_and_writes_stay_private(tmp_path):
    tensors = draw()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path, ROWS, torch.float32)
    again = load_weights(tmp_path, ROWS, torch.float32)
    loaded["embed"].zero_()
    assert torch.equal(again["embed"], tensors["embed"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["embed"], tensors["embed"])


def test_any_device_gets_copies(tmp_path):
    save_file(draw(), tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path, ROWS, torch.bfloat16, "meta")
    assert {tensor.device.type for tensor in loaded.values()} == {"meta"}
    assert loaded["norm.weight"].dtype == torch.float32


def test_missing_unexpected_and_misshapen_are_named_with_counts(tmp_path):
    tensors = draw()
    del tensors["scale"]
    tensors["blocks.0.bias"] = torch.zeros(5)
    tensors |= {f"extra.{number}": torch.zeros(1) for number in range(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert "1 missing (scale)" in message
    assert "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4, ...)" in message
    assert "1 of another shape (blocks.0.bias is [5] and should be [6])" in message


def test_first_five_missing(tmp_path):
    save_file({"scale": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    rows = [Row("scale", ()), *(Row(f"w{number}", (2,)) for number in range(9))]
    assert "9 missing (w0, w1, w2, w3, w4, ...)" in refused(tmp_path, rows)


@pytest.mark.parametrize("keys", [("shared",), ("a.embed",), ("a.embed", "shared"), ("shared", "z.embed")])
def test_a_tied_weight_may_be_stored_under_either_key_or_both(tmp_path, keys):
    """Under both, its own counts."""
    known = KeyMap((also("a.embed", "shared"), also("z.embed", "shared")))
    values = {key: torch.full((3, 2), float(i)) for i, key in enumerate(keys)}
    save_file(values, tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path, (Row("shared", (3, 2), tied=True),), torch.float32, keys=known)
    assert list(loaded) == ["shared"] and torch.equal(
        loaded["shared"], values["shared" if "shared" in keys else keys[0]]
    )
    if len(keys) == 2:
        assert "'shared' is stored twice" in refused(tmp_path, (Row("shared", (3, 2)),), keys=known)


def test_a_key_map_moves_and_drops_keys(tmp_path):
    save_file(
        {"model.a": torch.ones(2), "model.position_ids": torch.arange(3)}, tmp_path / "model.safetensors"
    )
    known = KeyMap((moved("model.a", "a"), *unread("model.position_ids")))
    assert list(load_weights(tmp_path, [Row("a", (2,))], torch.float32, keys=known)) == ["a"]
    twice = KeyMap((moved("model.a", "a"), also("model.position_ids", "a")))
    assert "'a' is stored twice" in refused(tmp_path, [Row("a", (2,))], keys=twice)


def test_integers_without_scales_are_refused_not_cast(tmp_path):
    save_file({"a": torch.ones(2).to(torch.int8)}, tmp_path / "model.safetensors")
    assert "a is I8" in refused(tmp_path, [Row("a", (2,))])


@pytest.mark.parametrize("shard", [0, 2])
def test_truncated_shard(tmp_path, shard):
    file = write_shards(tmp_path, draw())[shard]
    file.write_bytes(file.read_bytes()[:-1])
    message = refused(tmp_path)
    assert file.name in message and "truncated" in message


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all!", b"\x02\0\0\0\0\0\0\0{}junk"]
)
def test_corrupted_file(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    message = refused(tmp_path)
    assert "model.safetensors" in message and "truncated or not a safetensors file" in message


def test_shard_named_by_the_index_is_absent(tmp_path):
    file = write_shards(tmp_path, draw())[1]
    file.unlink()
    assert file.name in refused(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]", "{"])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(tmp_path)


def test_which_files_of_a_directory(tmp_path):
    assert "no *.safetensors file" in refused(tmp_path)
    (tmp_path / "model.bin").touch()
    assert "only 'model.bin'" in refused(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    assert "'a.safetensors', 'b.safetensors'" in refused(tmp_path)
    for name in ("model.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert weight_files(tmp_path / "a.safetensors") == [tmp_path / "a.safetensors"]


def test_save_is_whole_and_readable_by_safetensors(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    weights = {"t": torch.arange(6.0).reshape(2, 3).T, "s": torch.tensor(2, dtype=torch.bfloat16)}
    save_weights(path, {"old": torch.zeros(3)})
    save_weights(path, weights)
    read = load_file(path)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]
    assert re.search(rb'"__metadata__":\{"format":"pt"\}', path.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_is_the_weights_and_one_mapping(tmp_path):
    """64 MiB of float32 in one tensor to 32 MiB of bfloat16: the peak rises by those 32 MiB and the mapping
    of 8, not by 96.
    """
    save_file({"embed": torch.ones(4096, 4096)}, tmp_path / "model.safetensors")
    code = """
import re, sys, torch
from pathlib import Path
from tinydiff.io.weights import load_weights
from tinydiff.parallel.plan import Row
status = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.ones(9).to(torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
weights = load_weights(Path(sys.argv[1]), [Row("embed", (4096, 4096))], torch.bfloat16)
print(status("VmHWM") - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 32 <= float(run.stdout) <= 32 + 8 + 4


# --- several ranks

DIVIDED = (
    Row("embed.weight", (48, 6), split=0),
    Row("again.weight", (48, 6), split=0, tied=True),
    *repeat(
        "blocks",
        3,
        linear_rows("qkv", 6, 24, "out", parts=(8, 8, 8), head=2),
        linear_rows("out", 8, 6, "in"),
        [Row("fused.weight", (6, 24), split=1, parts=(8, 16)), Row("mod.weight", (18, 6))],
        norm_rows("norm", 7, float32=True),
        [Row("table", (1, 6, 5), float32=True)],
    ),
    Row("places", (1, 9, 4)),
    Row("norm_out.weight", (6,), float32=True),
    Row("scale", ()),
    Row("empty", (0, 3)),
)
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")

LAYOUTS = {
    "tp 2": (Layout(tp=2), False),
    "tp 4": (Layout(tp=4), False),
    "tp 2 and two that hold the same": (Layout(ulysses=2, tp=2), False),
    "four that hold the same": (Layout(dp=2, cfg=2), False),
    "full sharding over 2": (Layout(ulysses=2, fsdp=True), True),
    "full sharding over 4": (Layout(cfg=2, ring=2, fsdp=True), True),
    "full sharding and tp": (Layout(ring=2, tp=2, fsdp=True), True),
    "full sharding of each replica": (Layout(dp=2, cfg=2, fsdp=True), True),
}


FUSED = KeyMap(
    (
        fused("both", "embed", "again"),
        swapped("blocks.*.modulation", "blocks.*.mod"),
        joined(("blocks.*.q", "blocks.*.k", "blocks.*.v"), "blocks.*.qkv"),
        *under("blocks.*", "blocks.*", moved("final", "norm", ones=2), transposed("up", "out.weight")),
        moved("positions", "places", lead=2),
    ),
    prefix="model.",
)
"""A layout with every kind of line."""


def _bytes_read(folder, layout, fsdp, dtype, keys):
    """Bytes that this rank takes from the files, once what it loads is found to be its part of what one rank
    loads.
    """
    axes = ("shard", "tp") if fsdp else ("tp",)
    groups = make_ranks(layout, 60).groups
    plan = Plan(groups=tuple((axis, groups[axis]) for axis in axes))
    replicas, blocks = groups["dp" if fsdp else "peers"], BLOCKS if fsdp else ()
    whole = load_weights(folder / "split", DIVIDED, dtype)
    taken, cut, budget, passed = [], module._cut, module.BUDGET, module.PASSED

    def counted(*given):
        taken.append(cut(*given).nbytes)
        return cut(*given)

    module._cut, module.BUDGET, module.PASSED = counted, 200, 100
    try:
        at = folder / ("fused" if keys.lines else "split")
        loaded = load_weights(at, DIVIDED, dtype, keys=keys, plan=plan, replicas=replicas, blocks=blocks)
    finally:
        module._cut, module.BUDGET, module.PASSED = cut, budget, passed
    expected = shard_weights(whole, DIVIDED, plan, blocks)
    assert list(loaded) == list(expected)
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    return sum(taken)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("keys", [AS_IS, FUSED], ids=["split", "fused"])
def test_ranks_read_the_checkpoint_once_together(tmp_path, name, dtype, keys):
    """The shards of a rank are the same from a file in which weights are fused, swapped and cut."""
    layout, fsdp = LAYOUTS[name]
    tensors = draw(DIVIDED)
    for path, stored in {"split": tensors, "fused": exported(tensors, DIVIDED, FUSED)}.items():
        (tmp_path / path).mkdir()
        write_shards(tmp_path / path, stored)
    read = on_ranks(layout.size, _bytes_read, tmp_path, layout, fsdp, dtype, keys)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= sum(read) <= 1.05 * size
    assert (
        max(read) <= 1.5 * size / layout.size
    )  # no rank reads for the others; 6 rows over 4 ranks are 2, 2, 2 and 0


def _refusal(folder, layout):
    plan = Plan(groups=(("tp", make_ranks(layout, 60).groups["tp"]),))
    try:
        load_weights(folder, DIVIDED, torch.float32, plan=plan)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("harm", ["truncated", "absent", "misshapen", "foreign"])
def test_every_rank_refuses_broken_weights_in_the_same_words(tmp_path, harm):
    tensors = draw(DIVIDED)
    if harm == "misshapen":
        tensors["scale"] = torch.ones(2)
    if harm == "foreign":
        tensors["norm_out.weight"] = torch.ones(6, dtype=torch.int8)
    file = write_shards(tmp_path, tensors)[1]
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    if harm == "absent":
        file.unlink()
    words = {
        "truncated": "truncated",
        "absent": "does not exist",
        "misshapen": "scale is [2] and should be []",
        "foreign": "is I8",
    }
    (said,) = set(on_ranks(2, _refusal, tmp_path, Layout(tp=2)))
    assert said.startswith("model_path: ") and words[harm] in said


def test_a_plan_that_does_not_divide_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    save_file(draw(DIVIDED), tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "_cut", None)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.qkv\.weight has 4 heads, which 8 ranks cannot share evenly"
    ):
        load_weights(tmp_path, DIVIDED, torch.float64, plan=Plan(groups=(("tp", Group("none", 8, 0)),)))


PEAK_OF_A_RANK = """
import re, sys, torch
import torch.distributed as dist
from pathlib import Path
from tinydiff.io.weights import load_weights
from tinydiff.parallel.plan import Group, Plan, Row
directory, count, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
plan = Plan(groups=(("tp", Group(dist.group.WORLD.group_name, 2, rank)),))
splits = {"alike": None, "up": 0, "down": 1}
rows = [Row(f"{name}.{i}", (2048, 4096), split) for i in range(count) for name, split in splits.items()]
status = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.ones(9).to(torch.bfloat16)
dist.barrier()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
weights = load_weights(directory, rows, torch.bfloat16, plan=plan)
print(status("VmHWM") - before, sum(tensor.nbytes for tensor in weights.values()) / 2**20)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("count", [1, 4])
def test_peak_memory_of_a_rank_is_what_it_holds_and_the_same_more_for_any_weights(tmp_path, count):
    """96 and 384 MiB of float32 to 32 and 128 of bfloat16 on each rank. Fresh processes: freed memory would
    hide what is used.
    """
    names = [f"{name}.{i}" for i in range(count) for name in ("alike", "up", "down")]
    save_file({name: torch.ones(2048, 4096) for name in names}, tmp_path / "model.safetensors")
    commands = [
        [sys.executable, "-c", PEAK_OF_A_RANK, str(tmp_path), str(count), str(rank)] for rank in range(2)
    ]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    answers = [rank.communicate(timeout=300) for rank in ranks]
    for out, error in answers:
        assert out, error
        peak, size = map(float, out.split())
        print(f"{size} MiB held, {peak - size:.1f} MiB above")
        assert size == 32 * count and size <= peak <= size + 8 + 24
