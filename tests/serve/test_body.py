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
        ([("image[0]", b"A")], {"image": [b"A"]}),
        (
            [("image[1]", b"B"), ("image[0]", b"A"), ("mask[0]", b"M")],
            {"image": [b"A", b"B"], "mask": [b"M"]},
        ),
        ([("image[10]", b"C"), ("image[9]", b"B")], {"image": [b"B", b"C"]}),
        ([("l[0][a]", "1"), ("l[0][b]", "2"), ("l[1][a]", "3")], {"l": [{"a": "1", "b": "2"}, {"a": "3"}]}),
        ([], {}),
    ],
)
def test_a_form_is_read_as_the_client_meant_it(parts, wanted):
    assert body._form(form(*parts), "B") == wanted


@pytest.mark.parametrize(
    "parts",
    [
        [("l[][path]", "x"), ("l[][path]", "y"), ("l[][scale]", "1")],
        [("a", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a[]", "2")],
        [("a[0]", "1"), ("a[]", "2")],
        [("a[0]", "1"), ("a[0]", "2")],
        [("a", "1"), ("a[0]", "2")],
        [("a]", "1")],
        [("[]", "1")],
        [("", "1")],
        [("a" + "[b]" * 40, "1")],
    ],
)
def test_a_form_that_could_mean_two_things_is_refused(parts):
    with pytest.raises(UserError):
        body._form(form(*parts), "B")


@pytest.mark.parametrize(
    "data", [b"--B\r\n", b"", b"--B\r\nContent-Disposition: form-data; name=a\r\n\r\nx", b"--C--"]
)
def test_a_broken_form_is_a_mistake_of_the_client(data):
    with pytest.raises(UserError, match="is a malformed form"):
        body._form(data, "B")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b'form-data; name="\xff"', "the name of a form field is not valid UTF-8"),
        (b'form-data; name="a"; name="b"', "is not a value with parameters"),
        (b'form-data; name="a', "is not a value with parameters"),
        (b'attachment; name="a"', "no Content-Disposition: form-data"),
        (
            b'form-data; name="a"\r\nContent-Transfer-Encoding: base64',
            "Content-Transfer-Encoding is not supported",
        ),
        (b'form-data; name="' + b"a" * 5000 + b'"', "are longer than 4096 bytes"),
    ],
)
def test_the_headers_of_a_part_are_checked(head, said):
    with pytest.raises(UserError, match=said):
        body._form(b"--B\r\nContent-Disposition: " + head + b"\r\n\r\nx\r\n--B--\r\n", "B")


@pytest.mark.parametrize(
    "named",
    [
        'filename="Bögen.png"'.encode("latin-1"),
        'filename="Bögen.png"'.encode(),
        'filename="図.png"'.encode("shift-jis"),
        b"filename*=UTF-8''B%C3%B6gen.png",
        b"filename*=none''x",
        b'filename=""',
        rb'filename="C:\a\b \"c\".png"',
        b"FileName=a.png",
    ],
)
def test_what_an_uploaded_file_is_called_is_of_no_matter(named):
    data = b'--B\r\ncontent-disposition:form-data; name="image";' + named + b"\r\n\r\n\x89PNG\r\n\r\n--B--"
    assert body._form(data, "B") == {"image": b"\x89PNG\r\n"}


@pytest.mark.parametrize(
    ("name", "wanted"), [(b'"a b"', "a b"), (b"a", "a"), ('"é"'.encode(), "é"), (rb'"a\"b"', 'a"b')]
)
def test_the_name_of_a_part_is_read(name, wanted):
    data = (
        b"pro\r\nlogue\r\n--B  \r\nContent-Disposition: form-data; name="
        + name
        + b"\r\n\r\n\r\n--B--\r\nepilogue"
    )
    assert body._form(data, "B") == {wanted: ""}


def test_text_of_a_form_is_utf8():
    with pytest.raises(UserError, match="is not valid UTF-8"):
        body._form(form(("prompt", "x")).replace(b"\r\nx", b"\r\n\xff"), "B")


UTF16 = '{"a": 1}'.encode("utf-16")
NO_OBJECTS = [
    UTF16,
    b"",
    b"{",
    b"[1]",
    b'"x"',
    b"null",
    b'{"a": NaN}',
    b"\xff",
    b'{"a": 1, "a": 2}',
    b"[" * 100_000,
    b"1" * 9999,
]


@pytest.mark.parametrize("data", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_a_body_is_one_json_object(data):
    with pytest.raises(UserError):
        body._json(data)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", {"a": ["\udfff"]}, {"\0": 1}])
def test_no_text_holds_what_no_text_can(value):
    with pytest.raises(UserError, match="contains a NUL character"):
        body._check_values("body", {"prompt": value})


def test_a_fingerprint_is_of_what_a_body_says():
    assert (
        body.fingerprint({"a": 1, "b": b"x"})
        == body.fingerprint({"b": b"x", "a": 1})
        != body.fingerprint({"a": 1, "b": b"y"})
    )
