"""Models put together from an overlay and a source that is not in diffusers layout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tinydiff.io import overlay, repositories
from tinydiff.records import UserError

MAPPINGS = [
    {"type": "file", "src": "config.json", "dst": "transformer/config.json"},
    {"type": "glob", "src": "shard-*.bin", "dst_dir": "transformer"},
    {"type": "tree", "src": "google/t5", "dst": "tokenizer"},
    {"type": "file", "src": "vae.pth", "dst_dir": "vae"},
]
BIG = 5000
SOURCE = {
    **{"config.json": b"{}", "shard-1.bin": b"1", "shard-2.bin": b"2", "vae.pth": bytes(BIG)},
    **{"google/t5/spiece.model": b"s", "google/t5/more/a.txt": b"a", "unasked.bin": b"x"},
}
MADE = {
    "model_index.json": b'{"_class_name": "P"}',
    "vae/config.json": b'{"z": 4}',
    "transformer/config.json": b"{}",
    "transformer/shard-1.bin": b"1",
    "transformer/shard-2.bin": b"2",
    "tokenizer/spiece.model": b"s",
    "tokenizer/more/a.txt": b"a",
    "vae/vae.pth": bytes(BIG),
}


def written(place: Path, files) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def made(place: Path):
    """The files of a materialised directory, without the record of what it was made of."""
    files = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != overlay.RECORD}


class Case:
    """A source, an overlay of it, and a cache in a directory of their own."""

    def __init__(self, place: Path):
        self.place, self.cache = place, place / "cache" / "materialized_models"
        self.source = written(place / "source", SOURCE)
        self.overlay = written(
            place / "overlay",
            {"model_index.json": b'{"_class_name": "P"}', "vae/config.json": b'{"z": 4}'},
        )
        self.manifest()

    def manifest(self, **changed):
        entries = {"source_model_id": str(self.source), "file_mappings": MAPPINGS} | changed
        written(self.overlay, {overlay.MANIFEST: json.dumps(entries).encode()})

    def materialised(self, trusted=False):
        found = overlay.of_directory(self.overlay, "org/model")
        return overlay.materialised(found, trusted)


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYDIFF_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(overlay, "COPIED", BIG)
    return Case(tmp_path)


@pytest.fixture
def builds(monkeypatch):
    """One entry per build."""
    seen, build = [], overlay._build
    monkeypatch.setattr(overlay, "_build", lambda each, place: (seen.append(place), build(each, place)))
    return seen


def test_cold_then_warm(case, builds):
    place = case.materialised()
    assert made(place) == MADE and place.parent == case.cache
    assert os.path.samefile(place / "vae/vae.pth", case.source / "vae.pth")  # a link
    assert not os.path.samefile(place / "transformer/config.json", case.source / "config.json")
    assert case.materialised() == place and len(builds) == 1
    assert sorted(path.name for path in case.cache.iterdir()) == [place.name, f"{place.name}.lock"]


def test_without_hard_links_a_symbolic_one_and_without_any_a_copy(case, monkeypatch):
    def refused(*_):
        raise OSError

    monkeypatch.setattr(overlay.os, "link", refused)
    place = case.materialised()
    assert made(place) == MADE and (place / "vae/vae.pth").is_symlink()
    shutil.rmtree(place)
    monkeypatch.setattr(overlay.os, "symlink", refused)
    assert made(case.materialised()) == MADE and not (place / "vae/vae.pth").is_symlink()


@pytest.mark.parametrize("name", ["vae/vae.pth", "transformer/shard-1.bin", overlay.RECORD])
def test_an_incomplete_one_is_built_again(case, builds, name):
    place = case.materialised()
    (place / name).unlink()
    assert made(case.materialised()) == MADE and len(builds) == 2


def test_a_stale_one_is_built_again(case, builds):
    place = case.materialised()
    written(case.source, {"shard-1.bin": b"other"})
    assert case.materialised() == place and len(builds) == 2
    assert made(place) == MADE | {"transformer/shard-1.bin": b"other"}
    written(case.overlay, {"vae/config.json": b'{"z": 16}'})
    other = case.materialised()
    assert other != place and made(other)["vae/config.json"] == b'{"z": 16}'


def test_a_source_that_is_gone(case, monkeypatch):
    place = case.materialised()
    (case.source / "vae.pth").unlink()
    assert made(case.materialised()) == MADE  # the hard link keeps it
    shutil.rmtree(place)
    with pytest.raises(UserError, match=r"has no file 'vae\.pth', which the overlay .* needs"):
        case.materialised()
    case.manifest(file_mappings=[{"type": "glob", "src": "*.gone", "dst_dir": "vae"}])
    with pytest.raises(UserError, match=r"needs '\*\.gone', which .* has not"):
        case.materialised()
    case.manifest(file_mappings=[], required_source_files=["T5.pth"])
    with pytest.raises(UserError, match=r"has no file 'T5\.pth'"):
        case.materialised()
    assert not [path for path in case.cache.iterdir() if path.is_dir()]


LEAVES = "def materialize(*_):\n    import os\n    os._exit(7)\n"
COUNTS = (
    "def materialize(overlay_dir, source_dir, output_dir, manifest):\n"
    "    with open(overlay_dir + '/../builds', 'a') as file:\n        file.write('x')\n"
)
ASKS = (
    "import sys\nfrom pathlib import Path\nfrom tinydiff.io import overlay\n"
    "found = overlay.of_directory(Path(sys.argv[1]), 'org/model')\nprint('ready', flush=True)\n"
    "print(overlay.materialised(found, trusted=True))"
)


def process(case):
    return subprocess.Popen(
        [sys.executable, "-c", ASKS, str(case.overlay)], stdout=subprocess.PIPE, text=True
    )


def code(case, text):
    case.manifest(custom_materializer="build.py")
    written(case.overlay, {"_overlay/build.py": text.encode()})


def test_killed_in_the_middle(case):
    code(case, LEAVES)
    killed = process(case)
    killed.communicate()
    [left] = [path for path in case.cache.iterdir() if path.is_dir()]
    assert killed.returncode == 7 and left.suffix == ".tmp" and made(left) == MADE
    (left / "garbage").touch()
    left.rename(left.with_suffix("")), shutil.copytree(left.with_suffix(""), left)  # whatever it died in
    code(case, LEAVES.replace("os._exit(7)", "pass"))
    assert made(case.materialised(trusted=True)) == MADE


def test_two_processes_at_once_build_one(case):
    code(case, COUNTS)
    with FileLock(f"{case.materialised(trusted=True)}.lock") as lock:
        shutil.rmtree(lock.lock_file.removesuffix(".lock"))
        both = [process(case) for _ in range(2)]
        assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
    said = {each.communicate()[0].strip() for each in both}
    assert len(said) == 1 and made(Path(said.pop())) == MADE
    assert (case.place / "builds").read_text() == "xx"  # the first, and one of the two


def test_code_runs_only_on_request(case):
    code(case, "def materialize(o, s, output_dir, m):\n    open(output_dir + '/mine', 'w').write(m['x'])\n")
    case.manifest(custom_materializer="build.py", x="y")
    with pytest.raises(UserError, match="give --trust-remote-code to allow it") as caught:
        case.materialised()
    assert caught.value.field == "trust_remote_code" and not case.cache.exists()
    assert made(case.materialised(trusted=True)) == MADE | {"mine": b"y"}
    code(case, "def materialize(*_):\n    raise KeyError('w')\n")
    with pytest.raises(UserError, match="failed: KeyError: 'w'"):
        case.materialised(trusted=True)
    case.manifest(custom_materializer="absent.py")
    with pytest.raises(UserError, match=r"has no Python file 'absent\.py'"):
        case.materialised(trusted=True)


OUT = ["/etc/x", "../x", "vae/../../x", "..", "", "C:/x", "a\\..\\x", "a\0b"]


@pytest.mark.parametrize("path", OUT)
@pytest.mark.parametrize("end", ["src", "dst"])
def test_paths_out_of_the_model(case, path, end):
    before = everything(case)
    case.manifest(file_mappings=[{"type": "file", "src": "vae.pth", "dst": "vae/x"} | {end: path}])
    with pytest.raises(UserError, match="is not a path inside the model"):
        case.materialised()
    case.manifest()
    assert everything(case) == before


@pytest.mark.parametrize("name", ["required_source_files", "source_allow_patterns"])
def test_names_out_of_the_source(case, name):
    case.manifest(**{name: ["../secret"]})
    with pytest.raises(UserError, match="is not a path inside the model"):
        case.materialised()


def everything(case):
    return {path: path.is_dir() or path.read_bytes() for path in case.place.rglob("*")}


def test_links_that_lead_out_of_the_overlay(case):
    outside = written(case.place / "outside", {"secret": b"s"})
    (case.overlay / "tokenizer").symlink_to(outside)  # a mapping's target is below it
    assert made(case.materialised()) == MADE and [*outside.iterdir()] == [outside / "secret"]
    (case.overlay / "model.json").symlink_to(outside / "secret")
    with pytest.raises(UserError, match="is a link that leads out of it"):
        case.materialised()


@pytest.mark.parametrize("target", ["vae/config.json", overlay.RECORD])
def test_two_files_for_one_name(case, target):
    case.manifest(file_mappings=[{"type": "file", "src": "vae.pth", "dst": target}])
    with pytest.raises(UserError, match=f"a second file is to be {target!r}"):
        case.materialised()
    assert (case.source / "vae.pth").read_bytes() == bytes(BIG)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"source_model_id": None}, "names no source_model_id"),
        ({"source_model_id": 3}, "source_model_id is 3 and must be a string"),
        ({"file_mappings": {}}, None),
        ({"file_mappings": 1}, "file_mappings is 1 and must be a list"),
        ({"file_mappings": ["x"]}, "file_mappings has 'x', which must be an object"),
        (
            {"file_mappings": [{"type": "move", "src": "a", "dst": "b"}]},
            r"it needs type \(file, tree, glob\)",
        ),
        ({"required_source_files": "x"}, "must be a list of strings"),
    ],
)
def test_manifests_that_are_none(case, changed, said):
    case.manifest(**changed)
    if said is None:
        assert set(made(case.materialised())) == {"model_index.json", "vae/config.json"}
        return
    with pytest.raises(UserError, match=said):
        case.materialised()


@pytest.fixture
def fetched(case, monkeypatch):
    """What is asked of the hub."""
    asked = []

    def answer(hub_id, wanted, revision=None, *_):
        asked.append((hub_id, revision, [*wanted]))
        return {"org/model": case.source, "org/overlay": case.overlay}[hub_id]

    monkeypatch.setattr(repositories, "fetched", answer)
    monkeypatch.setattr(repositories, "listing", lambda *_: [])
    return asked


def environment(monkeypatch, **entries):
    monkeypatch.setenv("SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY", json.dumps(entries))


def test_registry_of_the_environment(case, fetched, monkeypatch, tmp_path):
    assert overlay.named("org/model") is None
    entry = {"overlay_repo_id": "org/overlay", "overlay_revision": "v2", "source_revision": "v1"}
    environment(monkeypatch, **{"org/model": entry})
    case.manifest(required_source_files=["vae.pth"])
    assert made(overlay.materialised(overlay.named("org/model"))) == MADE
    (overlay_id, revision, wanted), source = fetched
    assert (overlay_id, revision) == ("org/overlay", "v2") and "_overlay/*" in wanted
    needed = ["vae.pth", "config.json", "shard-*.bin", "google/t5/*"]
    assert source == ("org/model", "v1", needed)
    overlay.materialised(overlay.named("org/model"))
    assert len(fetched) == 3  # the source is not asked for again
    file = written(tmp_path, {"registry.json": b'{"org/model": "org/overlay"}'}) / "registry.json"
    monkeypatch.setenv("TINYDIFF_MODEL_OVERLAY_REGISTRY", str(file))  # replaces the other's entry
    assert overlay.named("org/model").revision is None
    case.manifest(source_allow_patterns=["*.bin", "*"])
    overlay.materialised(overlay.named("org/model", revision="v3"))
    assert fetched[-1] == ("org/model", "v3", ["*.bin", "*"])


def test_a_registry_entry_replaces_a_built_in_one(case, fetched, monkeypatch):
    [name] = overlay.BUILT_IN
    assert overlay.named(name).directory == Path(overlay.BUILT_IN[name])
    environment(monkeypatch, **{name: str(case.overlay)})
    assert overlay.named(name).directory == case.overlay


def test_a_local_copy_of_the_source(case, monkeypatch):
    environment(monkeypatch, **{"org/source": str(case.overlay)})
    found = overlay.named(str(case.source))
    assert made(overlay.materialised(found)) == MADE and found.source == str(case.source)
    with pytest.raises(UserError, match=r"revision: 'v1' is given, but model_path .* is a local directory"):
        overlay.named(str(case.source), "v1")
    cached = case.place / "models--org--source" / "snapshots" / "0123"
    shutil.copytree(case.source, cached)
    assert overlay.named(str(cached)).source == str(cached)
    written(cached, {"model_index.json": b"{}"})  # in diffusers layout already
    assert overlay.named(str(cached)) is None


def test_an_overlay_without_a_manifest_is_the_model(case, monkeypatch):
    environment(monkeypatch, **{"org/model": str(case.overlay)})
    (case.overlay / overlay.MANIFEST).unlink()
    assert overlay.materialised(overlay.named("org/model")) == case.overlay


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "holds no JSON"),
        ("/no/such.json", "cannot be read"),
        ('{"org/model": 3}', "the entry of 'org/model' is 3"),
        ('{"org/model": {"repo": "x"}}', "must be a hub id or directory"),
    ],
)
def test_registries_that_are_none(case, monkeypatch, text, said, tmp_path):
    monkeypatch.setenv("TINYDIFF_MODEL_OVERLAY_REGISTRY", text)
    with pytest.raises(UserError, match=said):
        overlay.named("org/model")
    file = written(tmp_path, {"list.json": b"[1]"}) / "list.json"
    monkeypatch.setenv("TINYDIFF_MODEL_OVERLAY_REGISTRY", str(file))
    with pytest.raises(UserError, match="holds a JSON list; it must be an object"):
        overlay.named("org/model")
