"""docs/lora.md: the cells of its tables are those that the tests of the reader go through."""

import re

import pytest

from tests.io.lora_files import FAMILIES, randn, read
from tests.io.test_lora_kinds import component
from tests.io.test_lora_layouts import LAYOUTS
from tests.sources import ROOT

TEXT = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
COLUMNS = {
    "FLUX.1": "FLUX.1-dev",
    "FLUX.2": "FLUX.2 dev",
    "Ovis": "Ovis",
    "SD3": "SD3.5 medium",
    "Z-Image": "Z-Image",
    "Qwen-Image": "Qwen-Image",
    "ERNIE": "ERNIE-Image",
    "Wan": "Wan I2V",
}
"""Column -> one of its families in the tests."""
ROWS = {
    "diffusers, SimpleTuner": "diffusers",
    "PEFT, fal": "PEFT, original",
    "kohya, A1111, musubi": "kohya",
    "ComfyUI, ai-toolkit, lightx2v": "ComfyUI",
    "OneTrainer": "OneTrainer",
    "LyCORIS": "LyCORIS",
    "VideoX-Fun": "VideoX-Fun",
    "Lightning": "Lightning",
    "DiffSynth": "DiffSynth",
}
"""Row -> its layout in the tests, which go through every family."""
FLUX_ONLY = {"XLabs", "Black Forest Labs' control LoRAs"}


def table(head):
    """The cells of the table whose head begins so: row -> cells."""
    _, _, rest = TEXT.partition(f"| {head} |")
    rows = [line.strip("| ").split(" | ") for line in rest.split("\n\n")[0].splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def test_the_table_of_layouts():
    cells = table("written by")
    assert {name for name, row in cells.items() if row[1:] == ["yes"] * 8} == set(ROWS)
    assert {name for name, row in cells.items() if row[1:] == ["yes"] + ["-"] * 7} == FLUX_ONLY
    assert set(cells) == set(ROWS) | FLUX_ONLY
    assert set(ROWS.values()) <= set(LAYOUTS) and set(COLUMNS.values()) <= set(FAMILIES)
    head = re.search(r"\| written by \| keys begin with \| (.*) \|", TEXT)
    assert head[1].split(" | ") == [*COLUMNS]


@pytest.mark.parametrize("row", ROWS)
def test_keys_begin_as_the_page_says(row):
    _, pattern, (down, _), _ = LAYOUTS[ROWS[row]]
    begins = pattern.format("", _="")
    said = table("written by")[row][0]
    assert f"`{begins}`" in said if begins else "no prefix" in said
    assert all(part in down for part in re.findall(r"`(\.[^`]+)`", said))


ONE = {
    "LoRA, of convolutions too, with a core": {"lora_A": (4, 8), "lora_B": (12, 4)},
    "LoRA with biases": {"diff_b": (12,)},
    "DoRA, of rows or columns": {"lora_A": (4, 8), "lora_B": (12, 4), "dora_scale": (12, 1)},
    "LoHa, with a core": {
        "hada_w1_a": (12, 2),
        "hada_w1_b": (2, 8),
        "hada_w2_a": (12, 2),
        "hada_w2_b": (2, 8),
    },
    "LoKr, with a core": {"lokr_w1": (3, 2), "lokr_w2": (4, 4)},
    "OFT of LyCORIS and kohya": {"oft_blocks": (3, 4, 4)},
    "OFT of PEFT": {"oft_R": (2, 6)},
    "full difference of a weight, bias, norm or table": {"diff": (12, 8)},
    "a weight in place of the model's": {"set_weight": (12, 8)},
}
"""Row of the table of kinds -> the parts of a small file."""


@pytest.mark.parametrize("kind", ONE)
def test_the_table_of_kinds(tmp_path, kind):
    """Which kinds can stay beside the weights."""
    tensors = {}
    for part, shape in ONE[kind].items():
        end = ".weight" if part in ("lora_A", "lora_B", "oft_R") else ""
        tensors[f"transformer.layer.{part}{end}"] = randn(*shape)
    differences = read(tmp_path, tensors, component((12, 8))).targets["transformer"]
    low_rank = all(each.low_rank() is not None for each in differences.values())
    assert table("kind")[kind][1] == ("yes" if low_rank else "merged only")
    assert set(table("kind")) == set(ONE)
