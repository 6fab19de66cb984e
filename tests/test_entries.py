"""Entries of JSON files as fields of a record: values, or one sentence that names field, value and what is
allowed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tinydiff.entries import typed


@dataclass(frozen=True)
class Record:
    width: int = 1
    num_layers: int = 1
    eps: float = 0.0
    ratio: float | None = None
    kind: str | None = None
    gated: bool = True
    patch: tuple[int, int] = (1, 1)
    names: tuple[str, ...] = ()
    size: int | tuple[int, ...] = 1
    extra: Mapping[str, Any] | None = None


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("width", 7, 7),
        ("width", 7.0, 7),
        ("ratio", 2, 2.0),
        ("ratio", None, None),
        ("patch", [2, 3], (2, 3)),
        ("names", [], ()),
        ("size", [4, 5], (4, 5)),
        ("size", 4, 4),
        ("extra", {"a": 1}, {"a": 1}),
    ],
)
def test_what_fits_is_read(name, given, read):
    made = typed(Record, {name: given, "unknown": 1})
    assert made == {name: read} and type(made[name]) is type(read)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("width", None, "width is None; it must be an integer at least 1 and at most 16777216"),
        ("width", True, "width is True; it must be an integer"),
        ("width", 1.5, "width is 1.5; it must be an integer"),
        ("width", 0, "width is 0; it must be an integer at least 1"),
        ("width", 10**400, "it must be an integer at least 1"),
        ("num_layers", 1001, "num_layers is 1001; it must be an integer at least 1 and at most 1000"),
        ("eps", -1.0, "eps is -1.0; it must be a number at least 0 and at most 1"),
        ("ratio", math.inf, "ratio is inf; it must be a number or null"),
        ("ratio", 10**400, "it must be a number or null"),
        ("kind", 3, "kind is 3; it must be a string or null"),
        ("gated", 1, "gated is 1; it must be true or false"),
        ("patch", [1], "patch is [1]; it must be a list of 2, each an integer at least 1"),
        ("patch", "ab", "patch is 'ab'; it must be a list of 2"),
        ("names", ["a", 1], "names is ['a', 1]; it must be a list of values, each a string"),
        ("names", {"a": 1}, "names is {'a': 1}; it must be a list of values, each a string"),
        (
            "size",
            "x",
            "size is 'x'; it must be an integer at least 1 and at most 16777216 or a list of values",
        ),
        ("extra", [], "extra is []; it must be an object or null"),
        ("kind", ["x" * 200], "it must be a string or null"),
    ],
)
def test_what_does_not_is_one_sentence(name, given, sentence):
    with pytest.raises(ValueError) as caught:
        typed(Record, {name: given})
    assert sentence in str(caught.value) and len(str(caught.value)) < 200
