"""Real-ESRGAN's networks against their definitions written as torch modules, float64, random weights."""

import pytest
import torch
from torch import nn

from tests.parallel.test_cost import Alive
from tinydiff.models import upscalers
from tinydiff.models.upscalers import Compact, Dense
from tinydiff.ops.weights import Weights


class DenseBlock(nn.Module):
    def __init__(self, width, grown):
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"conv{i}", nn.Conv2d(width + (i - 1) * grown, grown, 3, padding=1))
        self.conv5 = nn.Conv2d(width + 4 * grown, width, 3, padding=1)
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, x):
        made = [x]
        for i in range(1, 5):
            made.append(self.relu(self.get_submodule(f"conv{i}")(torch.cat(made, 1))))
        return self.conv5(torch.cat(made, 1)) * 0.2 + x


class ThreeBlocks(nn.Module):
    def __init__(self, width, grown):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(width, grown) for _ in range(3))

    def forward(self, x):
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fold = c.fold
        self.conv_first = nn.Conv2d(3 * c.fold**2, c.features, 3, padding=1)
        self.body = nn.Sequential(*(ThreeBlocks(c.features, c.growth) for _ in range(c.blocks)))
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            self.add_module(name, nn.Conv2d(c.features, c.features, 3, padding=1))
        self.conv_last = nn.Conv2d(c.features, 3, 3, padding=1)
        self.relu, self.upsample = nn.LeakyReLU(0.2), nn.UpsamplingNearest2d(scale_factor=2)

    def forward(self, x):
        if self.fold > 1:
            x = nn.PixelUnshuffle(self.fold)(x)
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        x = self.relu(self.conv_up1(self.upsample(x)))
        x = self.relu(self.conv_up2(self.upsample(x)))
        return self.conv_last(self.relu(self.conv_hr(x)))


class SRVGGNetCompact(nn.Module):
    def __init__(self, c):
        super().__init__()
        first = [nn.Conv2d(3, c.features, 3, padding=1), nn.PReLU(c.features)]
        middle = [
            layer
            for _ in range(c.layers)
            for layer in (nn.Conv2d(c.features, c.features, 3, padding=1), nn.PReLU(c.features))
        ]
        self.body = nn.ModuleList([*first, *middle, nn.Conv2d(c.features, 3 * c.scale**2, 3, padding=1)])
        self.shuffle, self.nearest = nn.PixelShuffle(c.scale), nn.UpsamplingNearest2d(scale_factor=c.scale)

    def forward(self, x):
        return self.shuffle(nn.Sequential(*self.body)(x)) + self.nearest(x)


def reference(config):
    torch.manual_seed(0)
    module = (RRDBNet if isinstance(config, Dense) else SRVGGNetCompact)(config).double()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)
    return module


CONFIGS = [
    Dense(6, 5, 2),
    Dense(6, 5, 1, fold=2),
    Dense(6, 5, 1, fold=4),
    Compact(7, 3, 4),
    Compact(7, 0, 2),
    Compact(5, 2, 3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_equals_the_definition(config):
    module = reference(config)
    x = torch.rand(2, 3, 4 * 3, 4 * 5, dtype=torch.float64)
    made = upscalers.enlarge(config, Weights(module.state_dict()), x)
    assert made.shape == (2, 3, 12 * config.scale, 20 * config.scale)
    assert (made - module(x)).abs().max() < 1e-10


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_sizes_are_read_off_the_weights(config):
    shapes = {name: tuple(weight.shape) for name, weight in reference(config).state_dict().items()}
    assert upscalers.read(shapes) == config
    assert {row.name: row.shape for row in upscalers.spec(config)} == shapes
    last = list(shapes)[-1]
    assert upscalers.read({name: shape for name, shape in shapes.items() if name != last}) is None
    assert upscalers.read({**shapes, last: (99,)}) is None


def test_weights_of_other_networks_are_not_taken():
    assert upscalers.read({}) is None
    assert upscalers.read({"model.0.weight": (64, 3, 3, 3)}) is None
    assert upscalers.read({"body.0.weight": (8, 3, 3, 3), "conv_first.weight": (8,)}) is None


@pytest.mark.parametrize("size", [(5, 7), (6, 7), (1, 1)])
def test_a_size_that_does_not_fold_is_padded(size):
    config = Dense(6, 5, 1, fold=2)
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    made = upscalers.enlarge(config, Weights(reference(config).state_dict()), x)
    assert made.shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("config", [Dense(4, 3, 1), Dense(4, 3, 1, fold=2), Compact(4, 2, 2)], ids=str)
def test_a_pixel_depends_on_no_more_than_its_reach(config):
    w = Weights(reference(config).state_dict())
    side = 2 * config.reach + 9
    x = torch.rand(1, 3, side, side, dtype=torch.float64)
    far = x.clone()
    far[..., : side // 2 - config.reach - config.fold, :] += 1
    center = side // 2 * config.scale
    before, after = (upscalers.enlarge(config, w, each)[..., center, center] for each in (x, far))
    assert torch.equal(before, after)


@pytest.mark.parametrize("config", [Dense(), Dense(fold=2), Compact(), Compact(scale=2)], ids=str)
def test_the_memory_is_about_that_of_a_run(config):
    w = Weights({row.name: torch.empty(row.shape, device="meta") for row in upscalers.spec(config)})
    with torch.no_grad(), Alive() as alive:
        upscalers.enlarge(config, w, torch.empty(1, 3, 352, 352, device="meta"))
    assert upscalers.working_bytes(config, 352, 352) == pytest.approx(alive.most, rel=0.1)
