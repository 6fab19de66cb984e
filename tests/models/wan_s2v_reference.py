"""The arithmetic of Wan2.2 speech to video, written a second time: plain modules whose parameters have the
released names, in float64, one video at a time. diffusers has no class of this network.

It follows the published code's steps where `models.wan_s2v` does not: two segments with a modulation each,
complex rotations, the sound attended to frame by frame, convolutions in place of patches.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Attention(nn.Module):
    def __init__(self, width, heads, eps):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k, self.heads = RMSNorm(width, eps), RMSNorm(width, eps), heads

    def forward(self, x, context, turn=lambda y: y):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(context))), split(self.v(context))
        q, k = turn(q), turn(k)
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.o(y.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.dim
        self.self_attn, self.cross_attn = Attention(d, c.num_heads, c.eps), Attention(d, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(d, c.eps) if c.cross_attn_norm else nn.Identity()
        self.ffn = nn.Sequential(
            nn.Linear(d, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, d)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, d))
        self.eps = c.eps

    def forward(self, x, times, video, turn, text):
        """times [2, 6, D]: of the first `video` tokens and of the others."""
        table = self.modulation + times
        segments = (slice(0, video), slice(video, None))

        def normed(shift, scale):
            y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            return torch.cat([y[s] * (1 + table[i, scale]) + table[i, shift] for i, s in enumerate(segments)])

        def gated(y, gate):
            return x + torch.cat([y[s] * table[i, gate] for i, s in enumerate(segments)])

        y = normed(0, 1)
        x = gated(self.self_attn(y, y, turn), 2)
        x = x + self.cross_attn(self.norm3(x), text)
        return gated(self.ffn(normed(3, 4)), 5)


class Causal(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv = nn.Conv1d(fan_in, fan_out, 3, stride)

    def forward(self, x):
        return self.conv(torch.cat([x[..., :1], x[..., :1], x], -1))


class MotionEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.dim
        self.conv1_local = Causal(c.audio_dim, d // 4 * c.num_audio_token, 1)
        self.conv2, self.conv3 = Causal(d // 4, d // 2, 2), Causal(d // 2, d, 2)
        self.padding_tokens, self.parts = nn.Parameter(torch.zeros(1, 1, 1, d)), c.num_audio_token
        if c.enable_adain:
            self.conv1_global, self.final_linear = Causal(c.audio_dim, d // 4, 1), nn.Linear(d, d)

    def pooled(self, x):
        for conv in (None, self.conv2, self.conv3):
            x = x if conv is None else conv(x)
            x = F.silu(F.layer_norm(x.mT, x.shape[-2:-1], eps=1e-6).mT)
        return x.mT

    def forward(self, x):
        """[1, C, T] -> local [F, K, D], whole [F, D] or None."""
        local = [self.pooled(part) for part in self.conv1_local(x).chunk(self.parts, 1)]
        local = torch.stack(
            [*(part[0] for part in local), self.padding_tokens[0, 0].expand_as(local[0][0])], 1
        )
        whole = (
            self.final_linear(self.pooled(self.conv1_global(x)))[0] if hasattr(self, "final_linear") else None
        )
        return local, whole


class AudioEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weights, self.encoder = nn.Parameter(torch.zeros(1, c.audio_states, 1, 1)), MotionEncoder(c)

    def forward(self, x):
        share = F.silu(self.weights)
        return self.encoder((x * share).sum(1) / share.sum())


class AdaIN(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, 2 * d)


class Injector(nn.Module):
    def __init__(self, c):
        super().__init__()
        count = len(c.audio_inject_layers)
        self.injector = nn.ModuleList(Attention(c.dim, c.num_heads, 1e-6) for _ in range(count))
        if c.enable_adain:
            self.injector_adain_layers = nn.ModuleList(AdaIN(c.dim) for _ in range(count))


class Packer(nn.Module):
    def __init__(self, c):
        super().__init__()
        for name, kernel in (("proj", (1, 2, 2)), ("proj_2x", (2, 4, 4)), ("proj_4x", (4, 8, 8))):
            self.add_module(name, nn.Conv3d(c.in_dim, c.dim, kernel, kernel))


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head = nn.Linear(c.dim, c.out_dim * math.prod(c.patch_size))
        self.modulation = nn.Parameter(torch.zeros(1, 2, c.dim))


def tokens(volume):
    """[1, D, F, H, W] -> [F H W, D]."""
    return volume[0].flatten(1).T


def angles(c, times, rows, columns):
    """Rotations of a grid of positions, complex [F H W, head width / 2]."""
    width = c.dim // c.num_heads
    sixth = 2 * (width // 6)
    axes = []
    for at, size in ((times, width - 2 * sixth), (rows, sixth), (columns, sixth)):
        frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        axes.append(torch.as_tensor(np.array(at), dtype=torch.float64)[:, None] * frequency)
    f, h, w = map(len, axes)
    angle = torch.cat(
        [
            axes[0][:, None, None].expand(f, h, w, -1),
            axes[1][None, :, None].expand(f, h, w, -1),
            axes[2][None, None].expand(f, h, w, -1),
        ],
        -1,
    ).flatten(0, 2)
    return torch.polar(torch.ones_like(angle), angle)


class Reference(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, patch = c.dim, c.patch_size
        self.patch_embedding = nn.Conv3d(c.in_dim, d, patch, patch)
        self.cond_encoder = nn.Conv3d(c.cond_dim, d, patch, patch)
        gelu = nn.GELU(approximate="tanh")
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, d), gelu, nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head, self.frame_packer = Head(c), Packer(c)
        self.casual_audio_encoder, self.audio_injector = AudioEncoder(c), Injector(c)
        self.trainable_cond_mask = nn.Embedding(3, d)
        self.c = c

    def past(self, motion):
        """Tokens and rotations of past frames [C, F, H, W], the newest first."""
        c, (height, width) = self.c, motion.shape[2:]
        frames = motion.new_zeros(c.in_dim, 19, height, width)
        known = min(19, motion.shape[1])
        frames[:, 19 - known :] = motion[:, motion.shape[1] - known :]
        oldest, middle, newest = frames[None].split([16, 2, 1], 2)
        parts = []
        for layer, x, times, cell in (
            ("proj", newest, [-1], 2), ("proj_2x", middle, [-3], 4),
            ("proj_4x", oldest, [-19, -14, -9, -4], 8),
        ):  # fmt: skip
            rows, columns = (
                np.linspace(0, side // 2 - 1, side // cell).astype(int) for side in (height, width)
            )
            parts.append((tokens(getattr(self.frame_packer, layer)(x)), angles(c, times, rows, columns)))
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def times(self, t):
        half = self.c.freq_dim // 2
        angle = t.double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()]))
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def inject(self, index, x, sound, whole):
        """x: the video's tokens, by frame [F, N, D]."""
        if whole is None:
            y = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        else:
            shift, scale = self.audio_injector.injector_adain_layers[index].linear(F.silu(whole)).chunk(2, 1)
            y = F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale[:, None]) + shift[:, None]
        return x + self.audio_injector.injector[index](y, sound)

    def forward(self, x, t, text, reference, motion, pose, audio, past_frames):
        """x, pose [C, F, H, W], reference [C, 1, H, W], motion or None, audio [S, C, T].

        past_frames: how many there are, and how many latent frames of them.
        """
        c, kinds = self.c, self.trainable_cond_mask.weight
        filled = torch.cat([audio[..., :1].expand(-1, -1, past_frames[0]), audio], -1)
        sound, whole = self.casual_audio_encoder(filled[None])
        sound = sound[past_frames[1] :]
        whole = None if whole is None else whole[past_frames[1] :]

        grid = self.patch_embedding(x[None]) + self.cond_encoder(pose[None])
        f, h, w = grid.shape[2:]
        parts = [
            (tokens(grid) + kinds[0], angles(c, range(f), range(h), range(w))),
            (tokens(self.patch_embedding(reference[None])) + kinds[1], angles(c, [30], range(h), range(w))),
        ]
        if motion is not None:
            y, rotations = self.past(motion)
            parts.append((y + kinds[2], rotations))
        y, rotations = (torch.cat(each) for each in zip(*parts, strict=True))
        video = f * h * w

        def turn(heads):
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * rotations).flatten(-2)

        e, moving = self.times(t)
        still = self.times(torch.zeros_like(t))[1]
        text = self.text_embedding(text)
        after = {layer: i for i, layer in enumerate(sorted(c.audio_inject_layers))}
        for i, block in enumerate(self.blocks):
            y = block(y, torch.stack([moving, still]), video, turn, text)
            if i in after:
                frames = self.inject(after[i], y[:video].unflatten(0, (f, -1)), sound, whole)
                y = torch.cat([frames.flatten(0, 1), y[video:]])
        shift, scale = (self.head.modulation + e)[0]
        y = self.head.head(F.layer_norm(y[:video], y.shape[-1:], eps=c.eps) * (1 + scale) + shift)
        y = y.view(f, h, w, *c.patch_size, c.out_dim)
        return torch.einsum("fhwpqrc->cfphqwr", y).reshape(c.out_dim, *x.shape[1:])
