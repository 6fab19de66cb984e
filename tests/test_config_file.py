"""Config files that nobody should write: one sentence for each."""

from __future__ import annotations

import pytest

from tinydiff import config
from tinydiff.records import UserError


def sentence(path) -> str:
    with pytest.raises(UserError) as caught:
        config.parse(["--config", str(path)])
    assert "\n" not in str(caught.value) and caught.value.field in ("config", "hieght")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"height": 3, "height": 4}', "has the key 'height' twice"),
        ("height: 3\nheight: 4\n", "has the key 'height' twice"),
        ("vae_config: {use_tiling: true, use_tiling: false}", "has the key 'use_tiling' twice"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("{a: " * 20_000, "is nested too deeply"),
        ("height: 2024-13-45", "is neither JSON nor YAML"),
        ('{"height": ' + "9" * 5000 + "}", "is neither JSON nor YAML"),
        ("&a {x: *a}", "is nested too deeply"),
        ("a" * 1_000_001, "has more than 1000000 characters"),
        ("\0", "is not text: it holds zero bytes"),
        ("\ufeffhieght: 3", "hieght: no such key; did you mean 'height'?"),
    ],
    ids=lambda text: text[:30],
)
def test_odd_config_files(text, words, tmp_path):
    (tmp_path / "config").write_text(text)
    assert words in sentence(tmp_path / "config")


@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/a", "a" * 5000, "/", ""])
def test_a_config_file_that_cannot_be(path):
    assert sentence(path).startswith("config: ")
