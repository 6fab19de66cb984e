"""For all tests: one thread, and no gradients unless a test asks for them with `torch.enable_grad()`."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
