"""The pieces of double-stream networks: what the families' own tests, all without a mask, leave open."""

import torch

from tests.parity import close, draw
from tinydiff.models import joint
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()


def test_masked_text_is_as_if_absent():
    text, image = (tuple(draw(2, length, 3, 4, seed=seed + length) for seed in range(3)) for length in (5, 6))
    real = torch.tensor([3, 5])
    mask = torch.arange(5) < real[:, None]
    y_text, y_image = joint.joint_attention(PLAN, text, image, {"mask": mask.long()})
    for b, length in enumerate(real):
        of_text, of_image = (
            tuple(x[b : b + 1, :n] for x in each) for each, n in ((text, length), (image, 6))
        )
        alone_text, alone_image = joint.joint_attention(PLAN, of_text, of_image, {})
        close(y_text[b : b + 1, :length], alone_text)
        close(y_image[b : b + 1], alone_image)


def test_text_and_image_attend_to_each_other():
    text, image = (tuple(draw(1, length, 3, 4, seed=seed + length) for seed in range(3)) for length in (5, 6))
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(text, image, strict=True))
    expected = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    close(torch.cat(joint.joint_attention(PLAN, text, image, {}), 1), expected)


def test_heads_without_norms_are_the_projections():
    flat = {f"{name}.weight": draw(8, 6, seed=i) for i, name in enumerate(joint.IMAGE[:3])}
    x = draw(2, 5, 6, seed=9)
    for part, weight in zip(joint.heads(Weights(flat), x, 4), flat.values(), strict=True):
        close(part, (x @ weight.mT).unflatten(-1, (2, 4)))
