"""LTX-2's vocoders: log-mel spectrograms to waveforms.

LTX-2.0's is a HiFi-GAN to 24 kHz. LTX-2.3's has periodic activations between a doubling and a halving of the
rate, and extends the band: its waveform at 16 kHz is analysed again, and a second generator adds to it what
lies above, at 48 kHz. Sources: arXiv 2010.05646 (HiFi-GAN), 2206.04658 (BigVGAN) and the LTX2Vocoder and
LTX2VocoderWithBWE checkpoints.

Shape letters: B batch, C channels of sound, T windows of the spectrogram, M mel bins, N samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil, pi, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries, EntryDict, typed
from tinydiff.keymap import KeyMap, unread
from tinydiff.models.family import Vocoder
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows, under


@dataclass(frozen=True)
class Generator:
    """One generator. Field names are those of LTX2Vocoder's config.json; those of the second begin `bwe_`."""

    in_channels: int = 128
    hidden_channels: int = 1024
    out_channels: int = 2
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    upsample_factors: tuple[int, ...] = (6, 5, 2, 2, 2)
    resnet_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resnet_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    act_fn: str = "leaky_relu"
    leaky_relu_negative_slope: float = 0.1
    antialias: bool = False
    antialias_ratio: int = 2
    antialias_kernel_size: int = 12
    final_act_fn: str | None = "tanh"
    final_bias: bool = True

    def __post_init__(self) -> None:
        if (self.act_fn, self.antialias) not in (("leaky_relu", False), ("snakebeta", True)):
            raise ValueError(
                f"act_fn is {self.act_fn!r} with antialias {self.antialias}; LTX-2 has 'leaky_relu' without "
                "and LTX-2.3 'snakebeta' with it"
            )
        if self.final_act_fn not in (None, "tanh", "clamp"):
            raise ValueError(f"final_act_fn is {self.final_act_fn!r}; it must be 'tanh', 'clamp' or null")
        for name, other in (
            ("upsample_kernel_sizes", "upsample_factors"),
            ("resnet_kernel_sizes", "resnet_dilations"),
        ):
            if len(getattr(self, name)) != len(getattr(self, other)):
                raise ValueError(f"{name} and {other} must have equally many entries")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what enters each doubling, and of what leaves the last."""
        return tuple(self.hidden_channels // 2**i for i in range(len(self.upsample_factors) + 1))


@dataclass(frozen=True)
class Config:
    """Of either class. Field names but the first two are those of config.json.

    generator: from the spectrogram to a waveform at `input_sampling_rate`. extension: what adds a higher band
    to it, LTX2VocoderWithBWE's second generator; with it come the fields of its analysis.
    """

    generator: Generator = Generator()
    extension: Generator | None = None
    output_sampling_rate: int = 24000
    input_sampling_rate: int = 24000
    filter_length: int = 512
    hop_length: int = 80
    window_length: int = 512
    num_mel_channels: int = 64

    @property
    def sampling_rate(self) -> int:
        """Samples of a second of the waveform."""
        return self.output_sampling_rate


BWE = "LTX2VocoderWithBWE"
_PERIODIC: EntryDict = {
    "act_fn": "snakebeta",
    "antialias": True,
    "final_act_fn": None,
    "final_bias": False,
}
_FIRST: EntryDict = _PERIODIC | {
    "hidden_channels": 1536,
    "upsample_kernel_sizes": (11, 4, 4, 4, 4, 4),
    "upsample_factors": (5, 2, 2, 2, 2, 2),
}
_SECOND: EntryDict = _PERIODIC | {
    "hidden_channels": 512,
    "upsample_kernel_sizes": (12, 11, 4, 4, 4),
    "upsample_factors": (6, 5, 2, 2, 2),
}
"""Of LTX2VocoderWithBWE's generators: what its config.json leaves out where it is the default."""


def read(entries: Entries, class_name: str) -> Config:
    """config.json of either class. Raises ValueError, one sentence, naming the field."""
    second = {name.removeprefix("bwe_"): each for name, each in entries.items() if name.startswith("bwe_")}
    names = {each.name for each in fields(Generator)} | {each.name for each in fields(Config)}
    unknown = {name for name in entries if not name.startswith(("_", "bwe_"))} - names
    unknown |= {f"bwe_{name}" for name in (second if class_name != BWE else second.keys() - names)}
    if unknown:
        raise ValueError(f"a {class_name} has no field {min(unknown)}")
    if class_name != BWE:
        rate = typed(Config, entries).get("output_sampling_rate", 24000)
        first = Generator(**typed(Generator, entries))
        return Config(first, None, rate, rate)
    rates = {"input_sampling_rate": 16000, "output_sampling_rate": 48000}
    return Config(
        Generator(**_FIRST | typed(Generator, entries)),
        Generator(**_SECOND | typed(Generator, second)),
        **rates | typed(Config, entries),
    )


# --- weights


def _activation_rows(c: Generator, name: str, width: int) -> Iterator[Row]:
    if c.antialias:
        for way in ("upsample", "downsample"):
            yield Row(f"{name}.{way}.filter", (1, 1, c.antialias_kernel_size))
        for each in ("alpha", "beta"):
            yield Row(f"{name}.act.{each}", (width,))


def _generator_rows(c: Generator) -> Iterator[Row]:
    yield from conv_rows("conv_in", c.in_channels, c.widths[0], (7,))
    for i, kernel in enumerate(c.upsample_kernel_sizes):
        inner, outer = c.widths[i : i + 2]
        yield Row(f"upsamplers.{i}.weight", (inner, outer, kernel))
        yield Row(f"upsamplers.{i}.bias", (outer,))
        for j, size in enumerate(c.resnet_kernel_sizes):
            at = f"resnets.{i * len(c.resnet_kernel_sizes) + j}"
            for k in range(len(c.resnet_dilations[j])):
                for half in (1, 2):
                    yield from conv_rows(f"{at}.convs{half}.{k}", outer, outer, (size,))
                    yield from _activation_rows(c, f"{at}.acts{half}.{k}", outer)
    yield from _activation_rows(c, "act_out", c.widths[-1])
    last = conv_rows("conv_out", c.widths[-1], c.out_channels, (7,))
    yield from (row for row in last if c.final_bias or not row.name.endswith("bias"))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    if c.extension is None:
        yield from _generator_rows(c.generator)
        return
    yield from under("vocoder", _generator_rows(c.generator))
    yield from under("bwe_generator", _generator_rows(c.extension))
    frequencies = c.filter_length // 2 + 1
    yield Row("mel_stft.mel_basis", (c.num_mel_channels, frequencies))
    yield Row("mel_stft.stft_fn.forward_basis", (2 * frequencies, 1, c.filter_length))


def key_map(c: Config) -> KeyMap:
    """The basis of the inverse transform is read nowhere."""
    return KeyMap(unread("mel_stft.stft_fn.inverse_basis"))


# --- layers


def _doubled(x: Tensor, kernel: Tensor, ratio: int, pad: int, left: int, right: int) -> Tensor:
    """x at `ratio` times its rate, low-passed by `kernel` [1, 1, K]."""
    width = x.shape[1]
    x = F.pad(x, (pad, pad), mode="replicate")
    y = ratio * F.conv_transpose1d(x, kernel.to(x).expand(width, -1, -1), stride=ratio, groups=width)
    return y[..., left:-right]


def _snake(x: Tensor, w: Weights) -> Tensor:
    """x plus a periodic term whose rate and size are learned for each channel."""
    alpha, beta = (w[name].view(1, -1, 1).exp() for name in ("alpha", "beta"))
    return x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha).square()


def _activated(c: Generator, x: Tensor, w: Weights, slope: float) -> Tensor:
    """The activation; periodic ones run at a higher rate, so that they leave no overtones folded back."""
    if not c.antialias:
        return F.leaky_relu(x, slope)
    ratio, size = c.antialias_ratio, c.antialias_kernel_size
    pad, rest = size // ratio - 1, size - ratio
    left, right = pad * ratio + rest // 2, pad * ratio + (rest + 1) // 2
    x = _snake(_doubled(x, w["upsample.filter"], ratio, pad, left, right), w / "act")
    x = F.pad(x, (size // 2 + size % 2 - 1, size // 2), mode="replicate")
    width = x.shape[1]
    return F.conv1d(x, w["downsample.filter"].to(x).expand(width, -1, -1), stride=ratio, groups=width)


def _conv(x: Tensor, w: Weights, dilation: int = 1) -> Tensor:
    """A convolution that keeps the length."""
    return F.conv1d(x, w["weight"], w.get("bias"), padding="same", dilation=dilation)


def _resnet(c: Generator, x: Tensor, w: Weights, dilations: tuple[int, ...]) -> Tensor:
    slope = c.leaky_relu_negative_slope
    for k, dilation in enumerate(dilations):
        y = _conv(_activated(c, x, w / "acts1" / k, slope), w / "convs1" / k, dilation)
        x = x + _conv(_activated(c, y, w / "acts2" / k, slope), w / "convs2" / k)
    return x


def _generate(c: Generator, w: Weights, mel_BCTM: Tensor) -> Tensor:
    x = _conv(mel_BCTM.transpose(2, 3).flatten(1, 2), w / "conv_in")
    count = len(c.resnet_kernel_sizes)
    for i, (factor, kernel) in enumerate(zip(c.upsample_factors, c.upsample_kernel_sizes, strict=True)):
        if not c.antialias:
            x = F.leaky_relu(x, c.leaky_relu_negative_slope)
        up = w / "upsamplers" / i
        x = F.conv_transpose1d(x, up["weight"], up["bias"], factor, (kernel - factor) // 2)
        made = [
            _resnet(c, x, w / "resnets" / (i * count + j), dilations)
            for j, dilations in enumerate(c.resnet_dilations)
        ]
        x = torch.stack(made).mean(0)
    x = _conv(_activated(c, x, w / "act_out", 0.01), w / "conv_out")
    return torch.tanh(x) if c.final_act_fn == "tanh" else x.clamp(-1, 1) if c.final_act_fn == "clamp" else x


def _log_mel(c: Config, w: Weights, x_BCN: Tensor) -> Tensor:
    """Waveform [B, C, N] -> its log-mel spectrogram [B, C, T, M], each window ending at its place."""
    channels = x_BCN.shape[1]
    x = F.pad(x_BCN.flatten(0, 1)[:, None], (max(0, c.window_length - c.hop_length), 0))
    real, imaginary = F.conv1d(x, w["stft_fn.forward_basis"].to(x), stride=c.hop_length).chunk(2, 1)
    magnitude = (real.square() + imaginary.square()).sqrt()
    mel = (w["mel_basis"].to(x) @ magnitude).clamp(min=1e-5).log()
    return torch.unflatten(mel, 0, (-1, channels)).transpose(2, 3)


def _resampled(x: Tensor, ratio: int) -> Tensor:
    """x at `ratio` times its rate by a sinc under a Hann window, whose values are float32."""
    rolloff, lobes = 0.99, 6
    width = ceil(lobes / rolloff)
    size = 2 * width * ratio + 1
    time = (torch.arange(size, device=x.device) / ratio - width) * rolloff
    window = torch.cos(time.clamp(-lobes, lobes) * pi / lobes / 2) ** 2
    kernel = (torch.sinc(time) * window * rolloff / ratio).view(1, 1, -1)
    return _doubled(x, kernel, ratio, width, 2 * width * ratio, size - ratio)


# --- what callers use


def waveform(c: Config, w: Weights, mel_BCTM: Tensor) -> Tensor:
    """Log-mel spectrogram [B, C, T, M] -> waveform [B, C, N] at `c.sampling_rate`."""
    if c.extension is None:
        return _generate(c.generator, w, mel_BCTM)
    x = _generate(c.generator, w / "vocoder", mel_BCTM)
    samples, ratio = x.shape[2], c.output_sampling_rate // c.input_sampling_rate
    x = F.pad(x, (0, -samples % c.hop_length))
    above = _generate(c.extension, w / "bwe_generator", _log_mel(c, w / "mel_stft", x))
    return (above + _resampled(x, ratio)).clamp(-1, 1)[..., : samples * ratio]


def samples(c: Config, windows: int) -> int:
    """How many samples the waveform of so many windows has."""
    return windows * prod(c.generator.upsample_factors) * c.output_sampling_rate // c.input_sampling_rate


FAMILY = Vocoder(config=Config, spec=spec, waveform=waveform, read=read, keys=key_map)
