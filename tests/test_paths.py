"""Paths, URLs and text files as users give them, through the options that take them."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from tinydiff import config, paths
from tinydiff.config import SamplingOptions
from tinydiff.io import hub, output
from tinydiff.records import UserError
from tinydiff.runtime import estimate
from tinydiff.serve import server
from tinydiff.serve.options import ServeOptions

NOBODY = "~no-such-user-here"


@pytest.fixture
def homeless(monkeypatch):
    """A process whose user has no home directory, as in a container that runs under any number."""

    def nowhere(path: Path) -> Path:
        if path.parts and path.parts[0].startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", nowhere)


TAKERS = {
    "image_path": lambda name: config.parse(["--prompt", "a", "--image-path", name]),
    "config": lambda name: config.parse(["--config", name]),
    "prompt_path": lambda name: config.parse(["--prompt-path", f"{name}.txt"]),
    "output_path": lambda name: output.plan_target(name, "a.png", video=False),
    "model_path": hub.resolve,
    "api_key_file": lambda name: server.with_keys(ServeOptions(api_key_file=name)),
}


@pytest.mark.parametrize("field", TAKERS)
def test_a_home_that_does_not_exist_is_one_sentence(field, homeless):
    for name in (NOBODY, "~", "~/x"):
        with pytest.raises(UserError, match="no home directory is known for '~") as caught:
            TAKERS[field](name)
        assert caught.value.field == field and "\n" not in str(caught.value)


def test_a_home_that_does_not_exist_for_plan(homeless):
    with pytest.raises(UserError, match="no home directory is known for '~no-such-user-here'"):
        estimate.subject(NOBODY, SamplingOptions(), 1, 2)


def test_the_users_that_this_machine_has():
    with pytest.raises(
        UserError,
        match=r"~no-such-user-here/a\.png' does not exist: no home .* './~no-such-user-here/a\.png'",
    ):
        paths.path(f"{NOBODY}/a.png", "image_path")


def test_a_file_of_exactly_that_name_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"{NOBODY}.png").write_bytes(b"here")
    assert paths.path(f"{NOBODY}.png", "image_path") == Path(f"{NOBODY}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.path("~/a", "image_path") == tmp_path / "a" and paths.path("a~", "image_path") == Path("a~")


def test_what_has_a_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    names = ("file", "", "loop", "none", "file/below", "a" * 300, "\0")
    assert [paths.kind(tmp_path / name) for name in names] == ["file", "directory", "", "", "", "", ""]
    assert paths.kind(Path("/dev/null")) == "other"


@pytest.mark.parametrize("name", ["a" * 5000, "iVBORw0KGgo" * 40, "\0.png", "\udcff.png"])
def test_names_that_no_file_has_are_one_sentence(name):
    with pytest.raises(UserError, match="is not a file"):
        config.options({"prompt": "a", "image_path": name})
    with pytest.raises(UserError, match="is neither a file nor a directory here, nor a hub id"):
        hub.resolve(name)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("http://a/b", "http"),
        ("HTTPS://a/b", "https"),
        ("Data:image/png;base64,xx", "data"),
        ("http:a", ""),
        ("file:///a", ""),
        ("a/http://b", ""),
        ("C:\\a.png", ""),
        ("", ""),
    ],
)
def test_schemes(text, scheme):
    assert paths.scheme(text) == scheme


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://host/ü.png", "http://host/%C3%BC.png"),
        ("http://host/a b.png?q=ü x&r=1#part", "http://host/a%20b.png?q=%C3%BC%20x&r=1"),
        ("http://host/%C3%BC%20.png", "http://host/%C3%BC%20.png"),
        ("HTTP://bücher.example:8080/a", "http://xn--bcher-kva.example:8080/a"),
        ("https://user:pä@host/", "https://user:p%C3%A4@host/"),
        ("http://[::1]:80/ä", "http://[::1]:80/%C3%A4"),
        ("http://host", "http://host"),
        ("http://host/a|b<c>\"d'", "http://host/a%7Cb%3Cc%3E%22d'"),
    ],
)
def test_urls_are_sent_in_ascii(url, sent):
    assert paths.ascii_url(url) == sent


@pytest.mark.parametrize("url", ["http:///a.png", "http://host:port/", "http://[::1/", f"http://{'ü' * 80}/"])
def test_urls_that_cannot_be_taken_apart(url):
    with pytest.raises(ValueError):
        paths.ascii_url(url)


SEPARATED = "a\x0cb\x0bc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"


def test_a_prompt_is_a_line_and_nothing_else_ends_one(tmp_path):
    path = tmp_path / "Prompts.TXT"
    path.write_bytes(codecs.BOM_UTF8 + f"first\r\n{SEPARATED}\rthird\n\n  fourth".encode())
    assert config.parse(["--prompt-path", str(path)]).sampling.prompt == (
        "first",
        SEPARATED,
        "third",
        "fourth",
    )


@pytest.mark.parametrize(
    "text", ['{"prompt": "a", "seed": 7}', "prompt: a\nseed: 7\n", "prompt: a\r\nseed: 7\r\n"]
)
def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path, text):
    (tmp_path / "config").write_bytes(codecs.BOM_UTF8 + text.encode())
    made = config.parse(["--config", str(tmp_path / "config")]).sampling
    assert (made.prompt, made.seed) == (("a",), (7,))


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "keys").write_bytes(codecs.BOM_UTF8 + b"first\r\nsecond\r\n")
    assert server.with_keys(ServeOptions(api_key_file=str(tmp_path / "keys"))).api_key == ("first", "second")


@pytest.mark.parametrize("field", ["config", "prompt_path", "api_key_file"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("größe".encode("utf-16"), "is not text in UTF-8 but in UTF-16; save it as UTF-8"),
        (
            codecs.BOM_UTF16_BE + "a".encode("utf-16-be"),
            "is not text in UTF-8 but in UTF-16; save it as UTF-8",
        ),
        ("plain".encode("utf-16-le"), "is not text: it holds zero bytes"),
        (b"ab\xff", r"is not text in UTF-8 \(byte 2 is not\)"),
    ],
)
def test_files_that_are_not_utf8(tmp_path, field, data, reason):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        TAKERS[field](str(tmp_path / ("a" if field == "prompt_path" else "a.txt")))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "text", ["a: 2026-99-99", "[" * 100_000, "a: 9" + "9" * 5000, "a: !!int x", "? [a]\n: b"]
)
def test_configs_that_no_reader_takes_are_one_sentence(tmp_path, text):
    (tmp_path / "config").write_text(text)
    with pytest.raises(UserError) as caught:
        config.parse(["--config", str(tmp_path / "config")])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_numbers_survive(tmp_path):
    (tmp_path / "config").write_text(json.dumps({"prompt": "a", "guidance_scale": 4.5}))
    assert config.parse(["--config", str(tmp_path / "config")]).sampling.guidance_scale == 4.5
