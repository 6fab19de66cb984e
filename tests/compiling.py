"""The compiled loop without Inductor: what Dynamo traces and guards, run by torch's own operators.

One graph for all requests, breaks and recompilation are decided by Dynamo, so their counts are those of
Inductor's runs. What Inductor makes of a graph is tested once per mechanism.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from tinydiff.sampling.compile import _compiled


@contextmanager
def traced_by_dynamo(backend: str = "eager") -> Iterator[None]:
    """backend: "aot_eager" also traces what torch does with views, mutation and gradients."""
    compile = torch.compile

    def traced(fn, *, options=None, **more):
        options = options if backend == "inductor" else None  # no other backend knows Inductor's
        return compile(fn, backend=backend, options=options, **more)

    _compiled.clear()  # another test's graphs
    try:
        with patch.object(torch, "compile", traced):
            yield
    finally:
        _compiled.clear()
