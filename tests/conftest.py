"""For all tests: the CPU, one thread, and no gradients unless a test asks for them with `torch.enable_grad()`."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the figures compared here are those of float32 and float64 on the CPU

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
