import torch
import torch.nn.functional as F

from tests.parity import close, draw
from tinydiff.ops.conv import causal_conv3d, conv2d, per_frame
from tinydiff.ops.weights import Weights


def _weights(*kernel):
    return Weights({"weight": draw(4, 3, *kernel, seed=1), "bias": draw(4, seed=2)})


def test_no_frame_sees_a_later_one():
    w, x = _weights(3, 3, 3), draw(1, 3, 6, 5, 4)
    y = causal_conv3d(x, w)
    assert y.shape == (1, 4, 6, 5, 4)
    for frames in range(1, 6):
        close(causal_conv3d(x[:, :, :frames], w), y[:, :, :frames], 1e-12)


def test_it_is_a_convolution_with_zeros_in_front():
    w, x = _weights(3, 3, 3), draw(2, 3, 4, 5, 4)
    expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w["weight"], w["bias"])
    close(causal_conv3d(x, w), expected, 1e-12)


def test_the_past_stands_in_for_what_came_before():
    w, x = _weights(3, 3, 3), draw(1, 3, 7, 5, 4)
    y = causal_conv3d(x, w)
    for cut in (1, 2, 3, 6):  # a past of one frame is filled up with zeros
        close(causal_conv3d(x[:, :, cut:], w, x[:, :, max(0, cut - 2) : cut]), y[:, :, cut:], 1e-12)


def test_one_frame_takes_the_short_cut_to_two_dimensions():
    for kernel in ((3, 3, 3), (3, 1, 1), (1, 1, 1)):
        w, x = _weights(*kernel), draw(2, 3, 1, 5, 4)
        pads = (kernel[2] // 2, kernel[2] // 2, kernel[1] // 2, kernel[1] // 2, kernel[0] - 1, 0)
        close(causal_conv3d(x, w), F.conv3d(F.pad(x, pads), w["weight"], w["bias"]), 1e-12)


def test_a_bias_is_optional():
    w, x = _weights(3, 3, 3), draw(1, 3, 4, 5, 4)
    bare = Weights({"weight": w["weight"]})
    for frames in (1, 4):
        moved = causal_conv3d(x[:, :, :frames], bare) + w["bias"].view(1, -1, 1, 1, 1)
        close(moved, causal_conv3d(x[:, :, :frames], w), 1e-12)


def test_a_function_of_images_runs_on_every_frame():
    w = Weights({"weight": draw(4, 3, 3, 3, seed=1), "bias": draw(4, seed=2)})
    x = draw(2, 3, 3, 6, 4)
    y = per_frame(lambda frame: conv2d(frame, w, stride=2, padding=1), x)
    assert y.shape == (2, 4, 3, 3, 2)
    for frame in range(3):
        close(y[:, :, frame], F.conv2d(x[:, :, frame], w["weight"], w["bias"], 2, 1), 1e-12)
        close(
            per_frame(lambda frame: conv2d(frame, w, stride=2, padding=1), x[:, :, frame : frame + 1]),
            y[:, :, frame : frame + 1],
            1e-12,
        )
    assert torch.equal(per_frame(lambda frame: frame, x), x)
