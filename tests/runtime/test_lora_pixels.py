"""The two LoRAs in the package, read off the pixels: `purple` paints every shape, `yellow` the background."""

import numpy as np
import pytest
import torch

import tinydiff
from tests.runtime.test_continuous import EveryImage, loop_of, run
from tinydiff import config
from tinydiff.models.registry import SHIPPED
from tinydiff.runtime import pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.continuous import make_slot
from training import lora
from training.reading import read
from training.scenes import PALETTE

NAMES = ("purple", "yellow")
PROMPTS = (
    ("a large red circle in the centre, on a white background", 1, "white", {("red", "circle")}),
    (
        "a green square above a black ring on an orange background",
        3,
        "orange",
        {("green", "square"), ("black", "ring")},
    ),
)
"""(prompt, seed, background, shapes), which the model draws without an adapter."""


def loaded(**options):
    files = [f"{name}.safetensors" for name in NAMES]
    return tinydiff.load(
        lora_path=[SHIPPED] * 2, lora_weight_name=files, lora_nickname=list(NAMES), **options
    )


@pytest.fixture(scope="module")
def model():
    return loaded()


def image(model, prompt, seed, **loras):
    return tinydiff.generate(model, prompt, seed=seed, num_frames=1, loras=loras).images[0]


def shown(pixels):
    """(background, {(colour, shape)})."""
    reading = read(pixels)
    return reading.background, {(blob.colour, blob.shape) for blob in reading.blobs}


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "seed", "background", "shapes"), PROMPTS)
def test_an_adapter_shows_hides_and_mixes(model, prompt, seed, background, shapes):
    purple = {("purple", shape) for _, shape in shapes}
    base = image(tinydiff.load(), prompt, seed)
    assert shown(base) == (background, shapes)
    assert np.array_equal(image(model, prompt, seed, purple=0, yellow=0), base)
    assert shown(image(model, prompt, seed, purple=1)) == (background, purple)
    yellow, found = shown(image(model, prompt, seed, yellow=1))
    assert yellow == "yellow" and {colour for colour, _ in found} == {colour for colour, _ in shapes}
    assert shown(image(model, prompt, seed, purple=1, yellow=1)) == ("yellow", purple)


def test_half_of_an_adapter_lies_between(model):
    """The circle's mean colour, between red and purple."""
    prompt, seed, *_ = PROMPTS[0]
    red, purple = (np.array(PALETTE[name], float) for name in ("red", "purple"))
    rows, columns = np.mgrid[:128, :128]
    disc = (rows - 64) ** 2 + (columns - 64) ** 2 < 20**2
    seen = [image(model, prompt, seed, purple=strength)[disc].mean(0) for strength in (0, 0.5, 1)]
    way = [float((colour - red) @ (purple - red) / ((purple - red) @ (purple - red))) for colour in seen]
    assert way[0] < 0.01 and 0.02 < way[1] < 0.98 and way[2] > 0.99, way


def test_merged_adapters_show_too(model):
    prompt, seed, background, shapes = PROMPTS[0]
    merged = loaded(lora_merge_mode="merge", lora_scale=[1.0, 0.0])
    made = tinydiff.generate(merged, prompt, seed=seed, num_frames=1).images[0]
    assert shown(made) == (background, {("purple", shape) for _, shape in shapes})
    assert np.abs(made.astype(int) - image(model, prompt, seed, purple=1)).mean() < 0.5


def test_requests_with_different_adapters_share_a_batch_of_the_loop(model):
    """Each image of one batch shows its own adapters."""
    prompt, seed, background, shapes = PROMPTS[0]
    painted = {("purple", shape) for _, shape in shapes}
    asked = {
        "none": ({"purple": 0.0}, (background, shapes)),
        "purple": ({"purple": 1.0}, (background, painted)),
        "both": ({"purple": 1.0, "yellow": 1.0}, ("yellow", painted)),
    }
    loop, slots = loop_of(model, EveryImage), {}
    for name, (loras, _) in asked.items():
        sampling = config.options({"prompt": prompt, "seed": seed, "num_frames": 1, "loras": loras}).sampling
        [request] = admit(model.blueprint, sampling)
        conditioning = pipeline.condition(model, request)
        slots[name] = request, conditioning, make_slot(model, request, conditioning, name, 0)
    _, sizes = run(loop, [(0, [slot for _, _, slot in slots.values()])])
    assert set(sizes) == {3}
    for name, (request, conditioning, slot) in slots.items():
        tokens = slot.to_image_tokens(slot.denoising.state.x)
        made = pipeline.finish(model, request, conditioning.stages[-1].inputs, tokens).frames[0]
        assert shown(made) == asked[name][1], name


def test_the_script_trains_what_loads(tmp_path):
    """Two steps: the factors move, and the file changes the layers that it names."""
    with torch.enable_grad():
        trained = lora.train("yellow", rank=3, steps=2, batch=2)
    started = lora.factors(3, 1)
    assert trained.keys() == started.keys() and len(trained) == 6 * 6 * 2
    assert all(not torch.equal(trained[name], started[name]) for name in trained)
    lora.save(tmp_path / "own.safetensors", trained)
    model = tinydiff.load(lora_path=str(tmp_path / "own.safetensors"))
    attached = model.adapters["default"]
    assert (attached.layers, attached.merged) == ({"transformer": 36}, False)
