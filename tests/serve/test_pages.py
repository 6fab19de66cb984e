"""The page's files: that they are sent as they should be, load nothing from elsewhere, and fit each other."""

import re
from html.parser import HTMLParser

import falcon
import pytest
from falcon import testing

from tinydiff.serve import errors, pages

FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(pages.DIRECTORY.iterdir())}
PAGES = [name for name in FILES if name.endswith(".html")]
VOID = {"meta", "link", "input", "img", "br"}


class Tags(HTMLParser):
    """Every tag of a page as (name, attributes, names of the tags around it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.around, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}, tuple(self.around)))
        if tag not in VOID:
            self.around.append(tag)

    def handle_endtag(self, tag):
        assert self.around.pop() == tag, f"{tag} closes something else"


TAGS = {name: Tags(FILES[name]).found for name in PAGES}


@pytest.fixture(scope="module")
def client():
    app = falcon.App()
    errors.install(app)
    for template, resource in pages.routes(None):  # the files depend on no server
        app.add_route(template, resource)
    return testing.TestClient(app)


@pytest.mark.parametrize("address", ["/", "/docs"])
def test_a_page_comes_with_its_policy(client, address):
    answer = client.simulate_get(address)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (
        policy["default-src"] == "'none'"
        and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", [name for name in FILES if name not in PAGES])
def test_a_file_comes_with_its_type(client, name):
    answer = client.simulate_get(f"/page/{name}")
    assert answer.status_code == 200 and answer.text == FILES[name]
    assert answer.headers["content-type"] == pages.TYPES[name[name.rindex(".") :]]


def test_a_browser_that_has_a_file_is_answered_304(client):
    tag = client.simulate_get("/page/page.js").headers["etag"]
    known = client.simulate_get("/page/page.js", headers={"If-None-Match": tag})
    assert known.status_code == 304 and known.content == b"" and known.headers["etag"] == tag
    assert client.simulate_get("/page/page.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_has_no_body(client):
    answer = client.simulate_head("/")
    assert (
        answer.status_code == 200
        and answer.content == b""
        and answer.headers["content-type"].startswith("text/html")
    )


@pytest.mark.parametrize(
    "name", ["none.js", "index.html", "..%2fpages.py", "%2e%2e%2fpages.py", "%00", "page.js%00", "a" * 5000]
)
def test_nothing_else_is_sent(client, name):
    answer = client.simulate_get(f"/page/{name}")
    assert answer.status_code == 404 and set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_every_resource_is_public():
    assert all(resource.public for _, resource in pages.routes(None))


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_loaded_from_elsewhere(name):
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"'`)]*", FILES[name]))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", PAGES)
def test_no_script_or_style_is_inline(name):
    for tag, attributes, _ in TAGS[name]:
        assert not {key for key in attributes if key == "style" or key.startswith("on")}, (
            f"{tag} {attributes}"
        )
        assert tag != "style" and (tag != "script" or attributes.get("src"))


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_loads_is_there(name):
    loaded = [
        each["src"] if "src" in each else each["href"]
        for tag, each, _ in TAGS[name]
        if tag in ("script", "link", "img")
    ]
    assert loaded and all(address.removeprefix("page/") in FILES for address in loaded)


def test_what_a_script_imports_is_there():
    imported = {name for text in FILES.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert (
        imported == {"api.js", "brush.js", "form.js", "memory.js", "results.js", "server.js"}
        and imported <= FILES.keys()
    )


def test_what_the_scripts_look_for_is_in_the_page():
    known = {attributes["id"] for _, attributes, _ in TAGS["index.html"] if "id" in attributes}
    wanted = {
        id
        for name in ("page.js", "form.js", "server.js", "results.js")
        for id in re.findall(r'byId\("([\w-]+)"\)', FILES[name])
    }
    assert len(wanted) > 30 and wanted <= known


def test_ids_are_unique():
    for tags in TAGS.values():
        ids = [attributes["id"] for _, attributes, _ in tags if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_every_control_has_a_label():
    tags = TAGS["index.html"]
    labelled = {attributes.get("for") for tag, attributes, _ in tags if tag == "label"}
    for tag, attributes, around in tags:
        if tag in ("input", "textarea", "select", "progress", "canvas"):
            assert "aria-label" in attributes or attributes.get("id") in labelled or "label" in around, (
                attributes
            )
    assert len(labelled) > 10


def test_what_labels_and_descriptions_point_at_is_there():
    tags = TAGS["index.html"]
    ids = {attributes["id"] for _, attributes, _ in tags if "id" in attributes}
    pointed = {
        id
        for _, attributes, _ in tags
        for key in ("for", "aria-labelledby", "aria-describedby", "aria-controls")
        for id in attributes.get(key, "").split()
    }
    assert len(pointed) > 12 and pointed <= ids


def test_images_of_the_storage_may_be_shown(monkeypatch):
    assert "http" not in pages.policy()
    for name in ("S3_BUCKET_NAME", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"TINYDIFF_{name}", "x")
    monkeypatch.setenv("TINYDIFF_CLOUD_STORAGE_TYPE", "s3")
    monkeypatch.setenv("TINYDIFF_S3_ENDPOINT_URL", "https://minio.example.com/")
    parts = dict(part.strip().split(" ", 1) for part in pages.policy().split(";"))
    assert [name for name, value in parts.items() if "https://minio.example.com" in value.split()] == [
        "img-src",
        "media-src",
    ]
    monkeypatch.delenv("TINYDIFF_S3_ENDPOINT_URL")
    assert " https://x.s3.us-east-1.amazonaws.com;" in pages.policy()
