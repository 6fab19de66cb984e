"""The errors: they survive pickling and copying, and a user's text in them has bounds."""

import copy
import importlib
import inspect
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.sources import modules
from tinydiff import config
from tinydiff.records import LONGEST, LONGEST_MESSAGE, UserError, brief, nearest


def errors():
    """Every class of an error in the package."""
    found = {}
    for name in modules():
        if name.startswith("tinydiff.") and ".shapes" not in name:
            members = inspect.getmembers(importlib.import_module(name), inspect.isclass)
            found |= {
                f"{name}.{kind.__name__}": kind
                for _, kind in members
                if kind.__module__ == name and issubclass(kind, Exception)
            }
    return found


def made(kind):
    """An error of this class, each of its arguments different."""
    if kind.__init__ in (Exception.__init__, RuntimeError.__init__, ValueError.__init__):
        return kind("height: 100 is not allowed")
    names = inspect.signature(kind).parameters
    given = {"status": 400, "seconds": 2.5, "headers": {"retry-after": "3"}}
    return kind(*(given.get(name, f"some {name}") for name in names))


def test_every_error_survives_pickling_and_copying():
    found = errors()
    assert {
        "tinydiff.records.UserError",
        "tinydiff.records.RankError",
        "tinydiff.serve.errors.Refusal",
    } <= found.keys()
    for kind in found.values():
        error = made(kind)
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(other) is kind and vars(other) == vars(error) and str(other) == str(error) != ""
            assert other.args == error.args


def wrong_height(_):
    config.options({"height": "x"})


def test_a_mistake_in_another_process_comes_back_as_itself():
    method = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=method) as pool:
        with pytest.raises(UserError, match=r"^height: 'x' is not an integer$") as caught:
            pool.submit(wrong_height, 0).result()
        assert caught.value.field == "height"
        with pytest.raises(UserError, match=r"^height: 'x'"):
            pool.submit(wrong_height, 0).result()  # the pool lives on


def test_a_mistake_in_a_pool_of_multiprocessing_does_not_hang_it():
    with get_context("spawn").Pool(1) as pool, pytest.raises(UserError, match=r"^height: 'x'"):
        pool.map_async(wrong_height, [0]).get(timeout=120)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("abc", "'abc'"),
        (3.5, "3.5"),
        ([1, "a"], "[1, 'a']"),
        (None, "None"),
        (10**9, "1000000000"),
        pytest.param(-(10**5000), "an integer of more than 200 digits", id="many digits"),
    ],
)
def test_how_a_value_is_shown(value, text):
    assert brief(value) == text


def test_a_long_value_is_cut_before_anything_is_made_of_it():
    for value in ("x" * 20_000_000, [7] * 4_000_000, {"a": ["b" * 20_000_000] * 30}, [10**5000]):
        tracemalloc.start()
        assert len(brief(value)) <= LONGEST + 3
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()


def test_the_nearest_name_to_a_long_one_compares_its_beginning_only(monkeypatch):
    seen = []
    monkeypatch.setattr("difflib.get_close_matches", lambda name, names, n: seen.append(name) or [])
    assert nearest("y" * 20_000_000, ["png", "jpeg"]) == ""
    assert seen == ["y" * LONGEST]


def test_an_error_is_one_sentence_of_bounded_length():
    error = UserError("a" * 10_000, "height: \x1b[31m is\nnot " + "z" * 10_000 + " allowed")
    assert len(error.field) == LONGEST and len(str(error)) <= LONGEST_MESSAGE + 3
    assert str(error).startswith("height:  [31m is not zz") and str(error).endswith("zz allowed")
