import pytest

from tests.serve.fake import form
from tinydiff.records import UserError
from tinydiff.serve import body


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ([("a", "1")], {"a": "1"}),
        ([("a", "1"), ("a", "2")], {"a": ["1", "2"]}),
        ([("a[]", "1")], {"a": ["1"]}),
        ([("image[]", b"A"), ("image[]", b"B"), ("n", "2")], {"image": [b"A", b"B"], "n": "2"}),
        ([("o[a]", "1"), ("o[b][c]", "2")], {"o": {"a": "1", "b": {"c": "2"}}}),
        (
            [("l[][path]", "x"), ("l[][path]", "y"), ("l[][scale]", "1"), ("l[][scale]", "2")],
            {"l": [{"path": "x", "scale": "1"}, {"path": "y", "scale": "2"}]},
        ),
        ([("l[][path]", "x")], {"l": [{"path": "x"}]}),
        ([("image", b"\x89PNG\r\n\x1a\n\x00")], {"image": b"\x89PNG\r\n\x1a\n\x00"}),
        ([], {}),
    ],
)
def test_a_form_is_read_as_the_client_meant_it(parts, wanted):
    assert body._form(form(*parts), "multipart/form-data; boundary=B", 1000) == wanted


@pytest.mark.parametrize(
    "parts",
    [
        [("l[][path]", "x"), ("l[][path]", "y"), ("l[][scale]", "1")],
        [("a", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a[]", "2")],
        [("a]", "1")],
        [("[]", "1")],
        [("", "1")],
        [("a" + "[b]" * 40, "1")],
    ],
)
def test_a_form_that_could_mean_two_things_is_refused(parts):
    with pytest.raises(UserError):
        body._form(form(*parts), "multipart/form-data; boundary=B", 1000)


@pytest.mark.parametrize("data", [b"--B\r\n", b"", b"--B\r\nContent-Disposition: form-data; name=a\r\n\r\nx", b"--C--"])
def test_a_broken_form_is_a_mistake_of_the_client(data):
    with pytest.raises(UserError, match="is not a form"):
        body._form(data, "multipart/form-data; boundary=B", 1000)


@pytest.mark.parametrize("name", [b'name="\xff"', b'name="a"; filename="\xff"', b"name=\"a\"; filename*=none''x"])
def test_the_header_of_a_part_is_text(name):
    data = b"--B\r\nContent-Disposition: form-data; " + name + b"\r\n\r\nx\r\n--B--\r\n"
    with pytest.raises(UserError, match="body: "):
        body._form(data, "multipart/form-data; boundary=B", 1000)


def test_text_of_a_form_is_utf8():
    with pytest.raises(UserError, match="is not text"):
        body._form(form(("prompt", "x")).replace(b"\r\nx", b"\r\n\xff"), "multipart/form-data; boundary=B", 1000)


UTF16 = '{"a": 1}'.encode("utf-16")
NO_OBJECTS = [UTF16, b"", b"{", b"[1]", b'"x"', b"null", b'{"a": NaN}', b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000, b"1" * 9999]


@pytest.mark.parametrize("data", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_a_body_is_one_json_object(data):
    with pytest.raises(UserError):
        body._json(data)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", {"a": ["\udfff"]}, {"\0": 1}])
def test_no_text_holds_what_no_text_can(value):
    with pytest.raises(UserError, match="holds a character"):
        body._sound("body", {"prompt": value})


def test_a_fingerprint_is_of_what_a_body_says():
    assert body.fingerprint({"a": 1, "b": b"x"}) == body.fingerprint({"b": b"x", "a": 1}) != body.fingerprint({"a": 1, "b": b"y"})
