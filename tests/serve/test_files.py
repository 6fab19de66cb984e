"""The server's own files: ids, signed addresses, and what a sweep removes."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tinydiff.records import UserError
from tinydiff.serve import files as module
from tinydiff.serve.files import GRACE_S, Files, secret
from tinydiff.serve.jobs import Job, Output, new_id
from tinydiff.serve.store import open_store

PNG = b"\x89PNG something"


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path / "files", b"s" * 32, 3600.0, 10**6)


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path, None, 100)
    yield made
    made.close()


def names(files: Files) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def aged(files: Files, name: str, seconds: float) -> str:
    then = time.time() - seconds
    os.utime(files.folder / name, (then, then))
    return name


def done(store, files: Files, size: int = 10, given: int = 0, expires_at: float | None = None, **more) -> Job:
    """A completed job with one output of so many bytes."""
    inputs = {"image_path": tuple(files.put(PNG, "image/png") for _ in range(given))}
    job = Job(new_id("image"), "image", time.time(), inputs=inputs)
    store.add(job)
    assert store.take("a", time.time() + 60).id == job.id
    output = Output(files.put(b"x" * size, "image/png"), "image/png", size, 1, **more)
    assert store.finish(
        job.id, "a", "completed", outputs=[output], expires_at=expires_at or time.time() + 1000
    )
    return store.get(job.id)


def test_bytes_come_back_with_their_media_type(files):
    id = files.put(PNG, "image/png", "given")
    assert files.path(id).read_bytes() == PNG and files.media_type(id) == "image/png"
    assert names(files) == {id}


def test_a_finished_file_is_moved(files, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"frames")
    id = files.put(clip, "video/mp4", clip.name)
    assert (
        files.path(id).read_bytes() == b"frames" and files.media_type(id) == "video/mp4" and not clip.exists()
    )


@pytest.mark.parametrize(
    ("media_type", "hint", "extension"),
    [
        ("image/jpeg", "a.jpeg", ".jpeg"),
        ("image/jpeg", "a.JPG", ".jpg"),
        ("image/jpeg", "given", ".jpg"),
        ("image/png", "../../etc/passwd", ".png"),
        ("image/webp", "a.exe", ".webp"),
    ],
)
def test_the_extension_says_the_media_type(files, media_type, hint, extension):
    id = files.put(PNG, media_type, hint)
    assert (
        re.fullmatch(r"[0-9a-f]{48}\.[a-z0-9]+", id)
        and id.endswith(extension)
        and files.media_type(id) == media_type
    )


def test_an_unknown_media_type_is_a_fault(files):
    with pytest.raises(ValueError, match="text/html"):
        files.put(b"", "text/html")


def test_a_file_belongs_to_who_made_it_and_every_server_of_the_directory_knows(files):
    id, nobodys = files.put(PNG, "image/png", owner="a"), files.put(PNG, "image/png")
    another = Files(files.folder, files.secret, 1.0, 1)
    for each in (files, another):
        assert [each.belongs(id, owner) for owner in ("a", "b", "")] == [True, False, False]
        assert [each.belongs(nobodys, owner) for owner in ("a", "")] == [False, True]
    assert not Files(files.folder, b"t" * 32, 1.0, 1).belongs(id, "a")
    forged = id[:32] + nobodys[32:48] + id[48:]
    assert not files.belongs(forged, "") and not files.belongs(forged, "a")


def test_files_of_earlier_versions_are_a_keyless_servers(files):
    old = "a" * 32 + ".png"
    assert files.belongs(old, "") and not files.belongs(old, "a") and not files.belongs("../secret", "")


def test_every_id_is_unique(files):
    assert len({files.put(PNG, "image/png") for _ in range(50)}) == 50


@pytest.mark.parametrize(
    "id",
    [
        "",
        ".",
        "..",
        "../secret",
        "/etc/passwd",
        "secret",
        "a" * 32,
        "a" * 32 + ".exe",
        "a" * 32 + ".png\n",
        "é",
        "a" * 32 + "/.png",
        "\0",
    ],
)
def test_what_is_no_id_names_nothing(files, tmp_path, id):
    secret(tmp_path)
    files.put(PNG, "image/png")
    assert files.path(id) is None and files.elsewhere(id) is None and files.delete(id) is False
    with pytest.raises(KeyError):
        files.media_type(id)
    with pytest.raises(KeyError):
        files.moved(id, "http://x/")
    assert (tmp_path / "secret").is_file() and len(names(files)) == 1


def test_a_deleted_file_is_gone_but_read_to_its_end(files):
    id = files.put(PNG, "image/png")
    with files.path(id).open("rb") as reading:
        assert files.delete(id) is True
        assert reading.read() == PNG
    assert files.path(id) is None and files.delete(id) is False


def test_a_moved_file_leaves_its_url(files):
    id = files.put(PNG, "image/png")
    assert files.elsewhere(id) is None
    files.moved(id, "https://bucket/ä")
    assert files.path(id) is None and files.elsewhere(id) == "https://bucket/ä"
    assert files.delete(id) is True and files.elsewhere(id) is None and names(files) == set()


@pytest.mark.parametrize("source", ["bytes", "file"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(files, tmp_path, monkeypatch, source):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.put(PNG, "image/png")
    before = names(files)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"frames")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        files.put(PNG if source == "bytes" else clip, "image/png")
    assert caught.value.field == "state_dir" and str(tmp_path) not in str(caught.value)
    assert names(files) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full_while_writing(files, monkeypatch):
    monkeypatch.setattr(
        Path,
        "write_bytes",
        lambda path, data: Path.open(path, "wb") and os.write(os.open("/dev/full", os.O_WRONLY), data),
    )
    with pytest.raises(UserError, match="the disk is full"):
        files.put(PNG, "image/png")
    assert names(files) == set()


# --- signed addresses ---


def parts(url: str) -> tuple[str, str, str]:
    split = urlsplit(url)
    query = parse_qs(split.query)
    return split.path.split("/")[3], query["expires"][0], query["signature"][0]


def test_a_url_is_good_for_its_time(files, monkeypatch):
    url = files.url("a.png", "http://127.0.0.1:30000/", 60)
    assert url.startswith("http://127.0.0.1:30000/v1/files/a.png/content?expires=")
    assert files.verify(*parts(url))
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 61)
    assert not files.verify(*parts(url))


def test_a_url_is_valid_for_the_files_lifetime_by_default(files):
    assert abs(int(parts(files.url("a.png", "http://h"))[1]) - time.time() - 3600) < 5


@pytest.mark.parametrize("change", ["id", "expires", "signature", "secret"])
def test_a_url_that_was_changed_is_not_good(files, tmp_path, change):
    id, expires, signature = parts(files.url("a.png", "http://h", 60))
    if change == "secret":
        assert not Files(files.folder, b"t" * 32, 1, 1).verify(id, expires, signature)
        return
    changed = {
        "id": "b.png",
        "expires": str(int(expires) + 1),
        "signature": signature[:-1] + ("0" if signature[-1] != "0" else "1"),
    }
    assert not files.verify(**{"id": id, "expires": expires, "signature": signature, change: changed[change]})


@pytest.mark.parametrize("expires", ["", "x", "-1", "1e99", "٣", "\ud800", "9" * 5000])
def test_nonsense_is_not_good(files, expires):
    assert not files.verify("a.png", expires, "é\ud800")


def test_the_secret_is_made_once_and_private(tmp_path):
    folder = tmp_path / "state"
    made = secret(folder)
    assert len(made) == 32 and secret(folder) == made
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700


def test_servers_that_start_at_once_have_one_secret(tmp_path):
    found, gate = [], threading.Barrier(8)

    def start() -> None:
        gate.wait()
        found.append(secret(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"secret"}


def test_a_broken_secret_is_said(tmp_path):
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(UserError, match="is not a valid secret") as caught:
        secret(tmp_path)
    assert caught.value.field == "state_dir"


def test_the_secret_is_not_shown(files):
    assert "sss" not in repr(files)


# --- sweeping ---


def test_a_job_goes_with_its_files_when_its_time_has_come(files, store):
    now = time.time()
    old, young = (
        done(store, files, given=1, expires_at=now - 1),
        done(store, files, given=1, expires_at=now + 100),
    )
    assert files.sweep(store, now) == [old.id]
    assert store.get(old.id) is None and store.get(young.id) == young
    assert names(files) == {young.outputs[0].file, young.inputs["image_path"][0]}


def test_a_sweep_that_was_killed_is_made_up_for(files, store, monkeypatch):
    job = done(store, files, expires_at=time.time() - 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "delete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.sweep(store, time.time())
    assert names(files) == set()
    assert files.sweep(store, time.time()) == [job.id] and store.get(job.id) is None


def test_beyond_the_limit_the_oldest_lose_their_files_and_stay(tmp_path, store):
    files = Files(tmp_path / "files", b"s" * 32, 3600.0, 250)
    jobs = [done(store, files, 100) for _ in range(4)]
    assert files.sweep(store, time.time()) == [job.id for job in jobs[:2]]
    assert [len(store.get(job.id).outputs) for job in jobs] == [0, 0, 1, 1]
    assert names(files) == {job.outputs[0].file for job in jobs[2:]}
    assert files.sweep(store, time.time()) == []


def test_uploaded_outputs_keep_their_url_beyond_the_limit(tmp_path, store):
    files = Files(tmp_path / "files", b"s" * 32, 3600.0, 50)
    job = done(store, files, 100)
    [here] = job.outputs
    there = Output("b" * 32 + ".png", "image/png", 100, 2, url="https://bucket/b.png")
    store.update_outputs(job.id, [here, there])
    assert files.sweep(store, time.time()) == [job.id] and store.get(job.id).outputs == (there,)


def test_the_limit_does_not_take_what_waiting_jobs_were_given(tmp_path, store):
    files = Files(tmp_path / "files", b"s" * 32, 3600.0, 1)
    given = files.put(PNG, "image/png")
    store.add(Job(new_id("image"), "image", time.time(), inputs={"image_path": (given,)}))
    assert files.sweep(store, time.time()) == [] and names(files) == {given}


def test_what_a_killed_server_left_half_written_goes(files, store):
    files.put(PNG, "image/png")
    for name in (".0123456789abcdef.tmp", ".fedcba9876543210.tmp"):
        (files.folder / name).write_bytes(b"half")
    aged(files, ".0123456789abcdef.tmp", GRACE_S + 10)
    files.sweep(store, time.time())
    assert ".0123456789abcdef.tmp" not in names(files) and ".fedcba9876543210.tmp" in names(files)


def test_only_old_files_that_no_job_names_go(files, store):
    age = max(GRACE_S, files.lifetime) + 10
    nobodys, young = aged(files, files.put(PNG, "image/png"), age), files.put(PNG, "image/png")
    moved = files.put(PNG, "image/png")
    files.moved(moved, "https://bucket/x")
    aged(files, moved + ".url", age)
    waiting = aged(files, files.put(PNG, "image/png"), age)
    store.add(Job(new_id("video"), "video", time.time(), inputs={"image_path": (waiting,)}))
    made = aged(files, done_first(store, files), age)
    (files.folder / "notes.txt").write_text("of the user")
    aged(files, "notes.txt", age)
    files.sweep(store, time.time())
    assert names(files) == {young, waiting, made, "notes.txt"} and files.path(nobodys) is None


def done_first(store, files: Files) -> str:
    """The file of a job that was done, while another waits."""
    output = Output(files.put(PNG, "image/png"), "image/png", len(PNG), 1)
    job = Job(new_id("image"), "image", time.time(), priority=1)
    store.add(job)
    assert store.take("a", time.time() + 60).id == job.id and store.finish(
        job.id, "a", "completed", outputs=[output]
    )
    return output.file


def test_a_directory_that_is_not_there_yet_sweeps_nothing(files, store):
    assert files.sweep(store, time.time()) == []


def test_two_sweeps_at_once_do_no_harm(tmp_path, store):
    files = Files(tmp_path / "files", b"s" * 32, 3600.0, 500)
    kept = [done(store, files, 100) for _ in range(20)][-5:]
    failed = []

    def sweep() -> None:
        try:
            files.sweep(store, time.time())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = names(files)
    assert failed == [] and left <= {job.outputs[0].file for job in kept}
    assert len(left) >= 2  # who measured before another removed may remove one more
