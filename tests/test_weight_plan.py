"""`tinydiff plan --placements`: where every weight lies, as it is printed."""

from __future__ import annotations

import json

import pytest

from tinydiff import cli, config
from tinydiff.models import registry
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Row, linear_rows, repeat
from tinydiff.runtime import estimate
from tinydiff.runtime.weight_plans import network_placements
from tinydiff.weight_plan import lines


def printed(capsys, *argv: str) -> str:
    assert cli.main(["plan", "--placements", *argv]) == 0
    return capsys.readouterr().out


class Tiny:
    """A network of two blocks whose attention has fused weights."""

    config = None

    class family:
        role = "dit"

        @staticmethod
        def spec(_):
            block = (
                *linear_rows("qkv", 4, 12, "out", parts=(4, 4, 4), bias=False),
                *linear_rows("out.0", 4, 4, "in"),
            )
            return (*repeat("blocks", 2, block), Row("norm", (4,)))

        @staticmethod
        def blocks(_):
            return ((None, "blocks.0"), (None, "blocks.1"))


def test_equal_blocks_share_a_line():
    networks = {"transformer": network_placements(Tiny, Layout(ulysses=2, tp=2, fsdp=True))}
    assert (
        "\n".join(lines(networks))
        == """\
transformer: DeviceMesh(dp=1, tp=2, shard=2)
  weight                   shape            dp           tp            shard
  blocks.0-1.qkv.weight    [12 = 4+4+4, 4]  Replicate()  Shard(dim=0)  Shard(dim=0)
  blocks.0-1.out.0.weight  [4, 4]           Replicate()  Shard(dim=1)  Shard(dim=0)
  blocks.0-1.out.0.bias    [4]              Replicate()  Replicate()   Shard(dim=0)
  norm                     [4]              Replicate()  Replicate()   Replicate()
"""
    )


def test_the_plan_of_a_released_model(capsys):
    name = "Wan2.1-T2V-1.3B-Diffusers"
    out = printed(capsys, name, "--num-gpus", "4", "--tp-size", "2")
    assert out.startswith(f"{registry.named(name).name}, 4 ranks: cfg 2 (guidance runs), tp 2 (asked)\n")
    assert "transformer: DeviceMesh(dp=1, cfg=2, ring=1, ulysses=1, tp=2)" in out
    [line] = [line for line in out.splitlines() if "blocks.0-29.attn1.to_out.0.weight" in line]
    assert line.split()[-5:] == ["Replicate()"] * 4 + ["Shard(dim=1)"]


def test_json_names_every_weight(capsys):
    out = printed(capsys, "FLUX.1-dev", "--tp-size", "2", "--json")
    transformer = json.loads(out)["networks"]["transformer"]
    rows = estimate.subject("FLUX.1-dev", config.SamplingOptions(), 1, 2).net.rows
    assert transformer["mesh"] == {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 1, "tp": 2}
    assert list(transformer["weights"]) == [row.name for row in rows]
    fused = transformer["weights"]["single_transformer_blocks.0.proj_out.weight"]
    assert fused == {
        "shape": [3072, 15360],
        "placements": ["Replicate()"] * 4 + ["Shard(dim=1)"],
        "parts": [3072, 12288],
    }


def test_weights_that_cannot_be_shared_say_why(capsys):
    out = printed(capsys, "FLUX.1-dev", "--tp-size", "3")
    assert "text_encoder: DeviceMesh(dp=1, cfg=1, ring=1, ulysses=1, tp=3)" in out
    assert "whole on every rank: " in out and "a width of 32128, which 3 ranks cannot share evenly" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tp-size", "2"], "tp_size: every layout is compared; give --placements too to see one"),
        (["--tp-size", "7", "--placements"], "tp_size: 7 does not divide the denoiser's 12 heads"),
        (
            ["--num-gpus", "4", "--tp-size", "3", "--placements"],
            "num_gpus: 4 does not match tp_size 3",
        ),
    ],
)
def test_mistakes(argv, words, capsys):
    assert cli.main(["plan", "Wan2.1-T2V-1.3B-Diffusers", *argv]) == 2
    assert words in capsys.readouterr().err
