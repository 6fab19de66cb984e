"""For all tests: the CPU, one thread, and no gradients unless a test asks for them with
`torch.enable_grad()`.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # the figures compared here are those of float32 and float64 on the CPU
)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def compiler():
    """For tests that compile: a machine with Python and nothing else cannot."""
    from tinydiff.sampling.compile import has_compiler

    if not has_compiler():
        pytest.skip("no C++ compiler here, which torch.compile needs")
