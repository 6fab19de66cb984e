"""Random values for every option of a generation: each is admitted, or is one sentence that names a field,
within a budget.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields, replace

import numpy as np
import pytest

from tests.serve.counting import counting
from tinydiff import config
from tinydiff.config import ModelOptions
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, library
from tinydiff.runtime.admit import admit

LONG = 100_000
SAMPLING = [entry.name for entry in fields(config.SamplingOptions)]
NAMES = [name for name in config.NAMES if name != "model_path"]
WORDS = [
    "", " ", "a", "x" * LONG, "\u0663", "1\u0660", "nan", "-inf", "1e999", "1e-400", "9" * 400, "9" * 5000,
    "-1", "0", "1", "1_0", "0x10",
    "1,2", "1 2", ",", "=", "a=b", "{", "{}", '{"a": 1}', "[" * 500, "true", "null", "\0", "\ud800", "a\nb",
    "\u2028", "/", "..", "~",
    "fp16", "transformer=fp16", "http://", "data:,", "file:///etc/passwd", "1e-6", "1000", "64",
]  # fmt: skip
PLAIN = [
    None, True, False, 0, 1, -1, 2, 17, 64, 1000, 2**16, 2**63, 10**400, -(10**400), 10**5000, 0.5, 1e-6,
    -0.0, 1e308, 5e-324,
    [], [[]], [[[]]], [None], [1, 2], ["a", 1], [True], {}, {"a": 1}, {"a": {"a": []}}, {"": ""},
    {"transformer": "fp16"}, [{}], ["1"] * 3,
]  # fmt: skip
PYTHON = [
    math.nan, math.inf, -math.inf, b"", b"a\xff", bytearray(b"1"), (), (1,), ((1,),), {1}, object(), 1j,
    range(3), range(10**12), int,
    np.int64(64), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(3), np.array([1, 2]),
    np.zeros((2, 2)), np.array(["a"]),
    np.array([]), np.datetime64("2020-01-01"), np.array([None]), {1: 2}, {None: None}, {"a": np.array([1])},
]  # fmt: skip
MOST_CALLS, MOST_BYTES, MOST_COPIES = 200_000, 20_000_000, 20
"""What a run may cost: function calls and bytes, beside those for each character that is given."""


@pytest.fixture(scope="module")
def plan():
    return blueprint.read(ModelOptions())


def drawn(rng: random.Random, names: list[str], values: list) -> list[tuple[str, object]]:
    """One option or several, now and then one of them twice."""
    pairs = [(name, rng.choice(values)) for name in rng.sample(names, rng.choice([1, 1, 1, 3, 6]))]
    return pairs + [(pairs[0][0], rng.choice(values))] * rng.choice([0, 0, 1])


def outcome(call, told: str, size: int) -> str:
    """'admitted', or the field that the sentence is about."""
    field, sentence = "admitted", ""
    with counting() as cost:
        try:
            call()
        except UserError as error:
            field, sentence = error.field, str(error)
    assert cost.bytes < MOST_BYTES + MOST_COPIES * size, f"{cost.bytes:,} bytes: {told}"
    assert cost.calls < MOST_CALLS + MOST_COPIES * size, f"{cost.calls:,} calls: {told}"
    if field != "admitted":
        assert 5 < len(sentence) < 1000 and len(sentence.splitlines()) == 1, f"{sentence[:300]!r}: {told}"
        assert field and field.rpartition(".")[2][:40] in sentence.replace("-", "_"), (
            f"{field!r}, {sentence[:300]!r}: {told}"
        )
    return field


def many_ends(seen: dict[str, int], names: list[str]) -> None:
    """Something was admitted, and over a third of the options refused something."""
    assert seen["admitted"] and len(seen.keys() & set(names)) > len(names) // 3, seen


def fuzzed(seed: int, names: list[str], values: list, run, first: list, runs: int = 400) -> None:
    rng, seen = random.Random(seed), {}
    for number in range(runs):
        pairs = first + drawn(rng, names, values)
        told = (
            f"run {number}: "
            f"{[(name, (hex(value) if type(value) is int else ascii(value))[:80]) for name, value in pairs]}"
        )
        size = sum(len(value) for _, value in pairs if isinstance(value, str))
        field = outcome(lambda pairs=pairs: run(pairs), told, size)
        seen[field] = seen.get(field, 0) + 1
    many_ends(seen, names)


@pytest.mark.slow
def test_a_command_line(plan):
    def run(pairs):
        words = [
            word
            for name, value in pairs
            for word in (f"--{name.replace('_', '-')}", *([value] if value is not None else []))
        ]
        made = config.parse(words)
        if made.sampling.prompt:
            admit(plan, made.sampling)

    fuzzed(
        1, NAMES, [*WORDS, None], run, [("prompt", "a")], 80
    )  # tyro takes thousands of calls for each option


def test_keyword_arguments(plan):
    def run(pairs):
        fields = dict(pairs)
        library._only(fields, config.SamplingOptions)
        admit(plan, config.options({"prompt": "a"} | fields).sampling)

    fuzzed(2, [name for name in SAMPLING if name != "prompt"], [*WORDS, *PLAIN, *PYTHON], run, [])


def test_every_option_of_python():
    fuzzed(3, NAMES, [*WORDS, *PLAIN, *PYTHON], lambda pairs: config.options(dict(pairs)), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_config_file(kind, plan, tmp_path):
    path = tmp_path / f"options.{kind}"
    values = [value for value in [*WORDS, *PLAIN] if not (type(value) is int and abs(value) > 10**4000)]

    def written(name, value):
        return (
            f"{json.dumps(name)}: {json.dumps(value)}" if kind == "json" else f"{name}: {json.dumps(value)}"
        )

    def run(pairs):
        lines = [written(name, value) for name, value in pairs]
        path.write_text("{" + ", ".join(lines) + "}" if kind == "json" else "\n".join(lines), "utf-8")
        defaults, words = config.normalise(["--config", str(path), "--prompt", "a"])
        assert words == ['--prompt=["a"]']
        admit(plan, replace(config.checked(defaults).sampling, prompt=("a",)))

    fuzzed(
        4, [name for name in NAMES if name != "prompt"], values, run, [], 120 if kind == "yaml" else 400
    )  # PyYAML is slow
