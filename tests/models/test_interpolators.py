"""RIFE's IFNet against its definition written as torch modules, float64, random weights.

The package of the published modules, vsrife, needs VapourSynth, which pip builds only beside its C++ library.
So the definition is written here anew, from the paper and the layout of the published files.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parallel.test_cost import Alive
from tinydiff.models import interpolators
from tinydiff.models.interpolators import Config
from tinydiff.ops.weights import Weights


class Residual(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=groups)

    def forward(self, x):
        return F.leaky_relu(self.conv(x).mul(self.beta).add(x), 0.2)


class Block(nn.Module):
    def __init__(self, seen, width, outputs, groups):
        super().__init__()
        halves = [nn.Conv2d(seen, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)]
        self.conv0 = nn.Sequential(*(nn.Sequential(each, nn.LeakyReLU(0.2)) for each in halves))
        self.convblock = nn.Sequential(*(Residual(width, groups) for _ in range(8)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, 4 * outputs, 4, 2, 1), nn.PixelShuffle(2))

    def forward(self, x, flow, fraction):
        size = [round(side / fraction) for side in x.shape[2:]]
        parts = [x] if flow is None else [x, flow / fraction]
        small = torch.cat([F.interpolate(part, size, mode="bilinear") for part in parts], 1)
        made = self.lastconv(self.convblock(self.conv0(small)))
        flow, rest = F.interpolate(made, x.shape[2:], mode="bilinear").split([4, made.shape[1] - 4], 1)
        return flow * fraction, rest[:, :1], rest[:, 1:]


class Head(nn.Module):
    def __init__(self, hidden, encoded):
        super().__init__()
        self.cnn0 = nn.Conv2d(3, hidden, 3, 2, 1)
        self.cnn1, self.cnn2 = (nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))
        self.cnn3 = nn.ConvTranspose2d(hidden, encoded, 4, 2, 1)

    def forward(self, x):
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = F.leaky_relu(layer(x), 0.2)
        return self.cnn3(x)


def encoder(c):
    first, last = nn.Conv2d(3, c.hidden, 3, 2, 1), nn.ConvTranspose2d(c.hidden, c.encoded, 4, 2, 1)
    if c.encoder == 2:
        return nn.Sequential(first, last)
    if c.encoder == 4:
        middle = [nn.Conv2d(c.hidden, c.hidden, 3, padding=1) for _ in range(2)]
        layers = [layer for conv in (first, *middle) for layer in (conv, nn.LeakyReLU(0.2))]
        return nn.Sequential(*layers, last)
    return Head(c.hidden, c.encoded)


def pull(x, flow):
    """Each pixel at its own place plus the flow, in pixels, read with bilinear weights inside the border."""
    batch, channels, height, width = x.shape
    across = (torch.arange(width, dtype=x.dtype) + flow[:, 0]).clamp(0, width - 1)
    down = (torch.arange(height, dtype=x.dtype)[:, None] + flow[:, 1]).clamp(0, height - 1)
    left, top = across.floor().clamp(max=width - 2), down.floor().clamp(max=height - 2)
    right_share, low_share = (across - left)[:, None], (down - top)[:, None]

    def at(dy, dx):
        index = ((top + dy) * width + left + dx).long().flatten(1)[:, None].expand(-1, channels, -1)
        return x.flatten(2).gather(2, index).view(batch, channels, height, width)

    upper = at(0, 0) * (1 - right_share) + at(0, 1) * right_share
    lower = at(1, 0) * (1 - right_share) + at(1, 1) * right_share
    return upper * (1 - low_share) + lower * low_share


class IFNet(nn.Module):
    def __init__(self, c, fractions):
        super().__init__()
        self.fractions, self.outputs = fractions, c.outputs
        if c.encoder is not None:
            self.encode = encoder(c)
        for number, width in enumerate(c.widths):
            carried = 8 if c.outputs == 13 else 0
            seen = 7 + 2 * c.encoded + (5 + carried if number else 0)
            self.add_module(f"block{number}", Block(seen, width, c.outputs, c.groups))

    def forward(self, first, second, time, scale):
        height, width = first.shape[2:]
        multiple = 4 * int(self.fractions[0] / min(1, scale))
        padding = (0, -width % multiple, 0, -height % multiple)
        images = [F.pad(image, padding) for image in (first, second)]
        encoded = [self.encode(image) for image in images] if hasattr(self, "encode") else []
        plane = torch.ones_like(images[0][:, :1]) * time[:, None, None, None]
        pulled, pulled_encoded, flow, mask, more = images, encoded, None, None, None
        for number, fraction in enumerate(self.fractions):
            given = [*pulled, *pulled_encoded, plane]
            if number:
                given += [mask, more] if self.outputs == 13 else [mask]
            block = self.get_submodule(f"block{number}")
            step, new_mask, more = block(torch.cat(given, 1), flow, fraction / scale)
            flow = step + flow if number else step
            mask = mask + new_mask if number and not encoded else new_mask
            both = flow.split(2, 1)
            pulled = [pull(image, part) for image, part in zip(images, both, strict=True)]
            pulled_encoded = [pull(each, part) for each, part in zip(encoded, both, strict=False)]
        made = torch.lerp(pulled[1], pulled[0], mask.sigmoid())
        return made[..., :height, :width]


VERSIONS = {
    "4.5": (Config((8, 6, 4, 4), 5, None, 0, 0), (8, 4, 2, 1)),
    "4.6": (Config((8, 6, 4, 4), 6, None, 0, 0), (8, 4, 2, 1)),
    "4.7": (Config((8, 6, 4, 4), 6, 2, 6, 3), (8, 4, 2, 1)),
    "4.12": (Config((8, 6, 4, 4), 6, 4, 6, 3), (8, 4, 2, 1)),
    "4.14-lite": (Config((8, 6, 4, 4), 6, 5, 6, 3, 2), (8, 4, 2, 1)),
    "4.18": (Config((8, 6, 4, 4), 6, 5, 6, 3), (8, 4, 2, 1)),
    "4.22": (Config((8, 6, 4, 4), 13, 5, 6, 3), (8, 4, 2, 1)),
    "4.25": (Config((8, 6, 6, 6, 4), 13, 5, 6, 3), (16, 8, 4, 2, 1)),
    "4.25-lite": (Config((8, 6, 6, 10, 4), 13, 5, 6, 3), (32, 16, 8, 4, 1)),
}
NAMES = list(VERSIONS)


def reference(version):
    """The module of a version, narrow; its weights keep signals of about the same size through all layers."""
    torch.manual_seed(0)
    module = IFNet(*VERSIONS[version]).double()
    for weight in module.parameters():
        fan_in = weight[0].numel() if weight.ndim == 4 and weight.shape[0] > 1 else 1
        nn.init.normal_(weight, std=(0.9 if fan_in > 1 else 0.2) / fan_in**0.5)
    return module


def shapes(version):
    return {name: tuple(weight.shape) for name, weight in reference(version).state_dict().items()}


@pytest.mark.parametrize(
    ("version", "scale"), [*((version, 1.0) for version in NAMES), ("4.6", 0.5), ("4.22", 2.0), ("4.25", 4.0)]
)
def test_it_equals_the_definition(version, scale):
    """Two pairs of frames of odd sizes, each with a time of its own."""
    module, config = reference(version), VERSIONS[version][0]
    w = Weights(module.state_dict())
    first, second = torch.rand(2, 2, 3, 33, 71, dtype=torch.float64)
    time = torch.tensor([0.25, 0.6], dtype=torch.float64)
    with torch.no_grad():
        frames = [interpolators.prepared(config, w, image, scale) for image in (first, second)]
        made = interpolators.between(config, w, *frames, time, scale)[..., :33, :71]
        expected = module(first, second, time, scale)
    assert (made - expected).abs().max() < 1e-10
    assert (expected - first).abs().max() > 0.1 and (expected - second).abs().max() > 0.1


@pytest.mark.parametrize("version", NAMES)
def test_the_version_is_read_off_the_weights(version):
    config, fractions = VERSIONS[version]
    found = shapes(version)
    assert interpolators.read(found) == config and config.scales == fractions
    assert [(row.name, row.shape) for row in interpolators.spec(config)]
    assert {row.name: row.shape for row in interpolators.spec(config)} == found
    for name in found:
        assert interpolators.read({each: shape for each, shape in found.items() if each != name}) is None
        assert interpolators.read({**found, name: (99,)}) is None


def test_names_of_a_wrapper_and_of_training_are_not_the_networks():
    assert interpolators.canonical("module.block0.conv0.0.0.weight") == "block0.conv0.0.0.weight"
    assert interpolators.canonical("block4.lastconv.0.bias") == "block4.lastconv.0.bias"
    for name in ("module.teacher.conv0.0.0.weight", "caltime.0.weight", "module.unet.down0.conv1.0.weight"):
        assert interpolators.canonical(name) is None


def test_other_networks_are_not_taken():
    assert interpolators.read({}) is None
    assert interpolators.read({"conv_first.weight": (64, 3, 3, 3)}) is None
    old = {"block0.convblock.0.0.weight": (192, 192, 3, 3), "block3.lastconv.weight": (64, 5, 4, 4)}
    assert interpolators.read(old) is None and interpolators.too_old(old)
    assert not interpolators.too_old(shapes("4.6"))


def test_the_published_sizes_of_scales():
    """4.25 lite differs from 4.25 in the width of the last block alone; its scales follow from it."""
    published = Config((192, 128, 96, 64, 32), 13, 5, 16, 4)
    assert published.scales == (16, 8, 4, 2, 1) and published.multiple(1.0) == 64
    lite = replace(published, widths=(192, 128, 96, 64, 24))
    assert lite.scales == (32, 16, 8, 4, 1) and lite.multiple(1.0) == 128
    heavy = replace(published, widths=(384, 256, 192, 128, 64))
    assert heavy.scales == (16, 8, 4, 2, 1) and heavy.multiple(0.25) == 256
    assert Config((192, 128, 64, 32), 13, 5, 16, 4).multiple(2.0) == 32


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "config", [Config((192, 128, 64, 32), 13, 5, 16, 4), Config((192, 128, 96, 64), 6, None, 0, 0)], ids=str
)
def test_the_memory_is_about_that_of_a_run(config, scale):
    """Sizes alone, so the published widths cost nothing."""
    w = Weights({row.name: torch.empty(row.shape, device="meta") for row in interpolators.spec(config)})
    frame = torch.empty(1, 3, 500, 760, device="meta")
    with torch.no_grad(), Alive() as alive:
        pair = [interpolators.prepared(config, w, frame, scale) for _ in range(2)]
        interpolators.between(config, w, *pair, torch.empty(1, device="meta"), scale)
    estimated = interpolators.working_bytes(config, 500, 760, scale)
    assert estimated == pytest.approx(alive.most, rel=0.25)
