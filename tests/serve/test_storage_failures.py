"""Uploads to an object storage that fails, lies, is slow or is not there, and a server that stops before they
are done.
"""

from __future__ import annotations

import base64
import threading
import time

import pytest

from tests.serve.bucket import DATA, done, keeping, output_of, serving_storage, until, uploading


@pytest.fixture
def here(tmp_path):
    with keeping(tmp_path) as made:
        yield made


@pytest.fixture
def storage():
    with serving_storage() as made:
        yield made


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "AccessDenied"),
        (400, "InvalidBucketName"),
    ],
)
def test_wrong_keys_are_not_tried_again(here, storage, status, code):
    storage.script = lambda method, path, data: (status, code)
    job = done(here)
    with uploading(here, storage.endpoint, pauses=(60.0,)) as uploader:
        uploader.add(job.id, job.outputs[0])
        warning = until(lambda: output_of(here, job).warning)
    assert warning == f"the upload failed and this server keeps the file: the storage answered {code}"
    assert storage.asked == ["PUT"] and output_of(here, job).url is None
    assert here.files.path(job.outputs[0].file).read_bytes() == DATA


@pytest.mark.parametrize(
    "failure",
    [
        (500, "InternalError"),
        (503, "SlowDown"),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
    ],
)
def test_a_storage_that_fails_twice_is_tried_a_third_time(here, storage, failure):
    here_then = []

    def script(method, path, data):
        here_then.append(here.files.path(job.outputs[0].file) is not None)
        return failure if storage.asked.count("PUT") <= 2 and method == "PUT" else None

    storage.script = script
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    assert storage.asked == ["PUT", "PUT", "PUT", "HEAD"] and here_then == [True] * 4
    assert output_of(here, job).warning is None


def test_a_storage_that_always_fails_is_reported_and_the_file_stays(here, storage):
    storage.script = lambda method, path, data: (500, "InternalError")
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        warning = until(lambda: output_of(here, job).warning)
    assert storage.asked == ["PUT"] * 4 and "InternalError" in warning and "arn:aws" not in warning
    assert output_of(here, job).url is None and here.files.path(job.outputs[0].file) is not None


def test_a_storage_that_is_not_there_is_reported(here, storage):
    job = done(here)
    with uploading(here, "http://127.0.0.1:9") as uploader:  # the port of discard, where nobody listens
        uploader.add(job.id, job.outputs[0])
        assert until(lambda: output_of(here, job).warning).endswith("the storage does not answer")
    assert here.files.path(job.outputs[0].file) is not None


def test_a_storage_too_slow_is_reported(here, storage):
    over = threading.Event()
    storage.script = lambda method, path, data: over.wait(10) and None
    job = done(here)
    with uploading(here, storage.endpoint, answer_s=0.2, pauses=(0.01,)) as uploader:
        uploader.add(job.id, job.outputs[0])
        assert until(lambda: output_of(here, job).warning).endswith("the storage does not answer")
        over.set()
    assert here.files.path(job.outputs[0].file) is not None


def test_adding_does_not_wait_for_a_slow_storage(here, storage):
    over = threading.Event()
    storage.script = lambda method, path, data: over.wait(10) and None
    job = done(here, count=8)
    with uploading(here, storage.endpoint) as uploader:
        for output in job.outputs:
            uploader.add(job.id, output)
        assert not any(output.url for output in here.store.get(job.id).outputs)
        assert all(here.files.path(output.file) for output in job.outputs)
        over.set()
        until(lambda: all(output.url for output in here.store.get(job.id).outputs))


@pytest.mark.parametrize("wrong", ["size_said", "checksum_said"])
def test_an_upload_that_is_not_confirmed_is_none(here, storage, wrong):
    setattr(storage, wrong, len(DATA) - 1 if wrong == "size_said" else base64.b64encode(bytes(32)).decode())
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        assert until(lambda: output_of(here, job).warning).endswith("the object differs from the file")
    assert storage.asked == ["PUT", "HEAD"] * 4 and here.files.path(job.outputs[0].file).read_bytes() == DATA


def test_a_file_that_is_seen_late_is_looked_for_again(here, storage):
    storage.script = lambda method, path, data: (
        (404, "") if method == "HEAD" and storage.asked.count("HEAD") == 1 else None
    )
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    assert storage.asked == ["PUT", "HEAD", "PUT", "HEAD"]


def test_the_local_file_lingers_for_answers_on_their_way(here, storage):
    job = done(here)
    with uploading(here, storage.endpoint, linger=0.4) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
        confirmed = time.monotonic()
        assert here.files.path(job.outputs[0].file) is not None
        until(lambda: here.files.path(job.outputs[0].file) is None)
        assert time.monotonic() - confirmed > 0.2


def test_an_output_whose_job_was_deleted_stays_nowhere(here, storage):
    job = done(here)

    def script(method, path, data):
        if method == "HEAD":
            here.store.delete(job.id)

    storage.script = script
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: "DELETE" in storage.asked)
        until(lambda: not storage.objects)


def test_one_output_is_uploaded_once_however_often_it_is_added(here, storage):
    over = threading.Event()
    storage.script = lambda method, path, data: over.wait(10) and None
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        for _ in range(5):
            uploader.add(job.id, job.outputs[0])
        over.set()
        until(lambda: output_of(here, job).url)
    assert storage.asked == ["PUT", "HEAD"]


def test_beyond_the_bound_outputs_are_kept_here_and_say_so(here, storage):
    over = threading.Event()
    storage.script = lambda method, path, data: over.wait(10) and None
    job = done(here, count=5)
    with uploading(here, storage.endpoint, threads=1, most_waiting=2) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: storage.asked)  # the thread has that one
        for output in job.outputs[1:]:
            uploader.add(job.id, output)
        assert [bool(output.warning) for output in here.store.get(job.id).outputs] == [
            False,
            False,
            False,
            True,
            True,
        ]
        over.set()
        until(
            lambda: (
                [bool(output.url) for output in here.store.get(job.id).outputs]
                == [True, True, True, False, False]
            )
        )
    assert "too many wait" in here.store.get(job.id).outputs[4].warning


# --- stopping and starting ---


def test_closing_finishes_what_waits(here, storage):
    job = done(here, count=6)
    with uploading(here, storage.endpoint, threads=1) as uploader:
        for output in job.outputs:
            uploader.add(job.id, output)
        assert uploader.close(10.0) == 0
    assert all(output.url for output in here.store.get(job.id).outputs)


def test_closing_gives_up_in_time_and_the_next_start_goes_on(here, storage):
    storage.script = lambda method, path, data: (503, "SlowDown")
    job = done(here, count=3)
    with uploading(here, storage.endpoint, threads=1, pauses=(1e6,)) as uploader:
        for output in job.outputs:
            uploader.add(job.id, output)
        until(lambda: storage.asked)
        assert uploader.close(0.2) == 3
    assert [(output.url, output.warning) for output in here.store.get(job.id).outputs] == [(None, None)] * 3
    storage.script = lambda method, path, data: None
    with uploading(here, storage.endpoint) as uploader:
        assert uploader.pending(here.store.get(job.id)) == 3
        until(lambda: all(output.url for output in here.store.get(job.id).outputs))


def test_a_failed_upload_is_tried_again_at_the_next_start(here, storage):
    storage.script = lambda method, path, data: (403, "InvalidAccessKeyId")
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).warning)
    storage.script = lambda method, path, data: None
    with uploading(here, storage.endpoint) as uploader:
        uploader.pending(here.store.get(job.id))
        assert until(lambda: (new := output_of(here, job)).url and new).warning is None


def test_a_file_that_went_before_its_upload_was_noted_is_found_there(here, storage):
    job = done(here)
    [output] = job.outputs
    here.files.delete(output.file)
    storage.objects[f"/images/tinydiff/{job.id}/{output.file}"] = DATA, {"x-amz-checksum-sha256": "x"}
    with uploading(here, storage.endpoint) as uploader:
        uploader.pending(job)
        until(lambda: output_of(here, job).url)
    assert storage.asked == ["HEAD"]


def test_a_file_that_is_nowhere_is_reported(here, storage):
    job = done(here)
    here.files.delete(job.outputs[0].file)
    with uploading(here, storage.endpoint) as uploader:
        uploader.pending(job)
        assert (
            until(lambda: output_of(here, job).warning)
            == "the file is neither here nor in the storage: the storage answered 404"
        )


def test_an_uploaded_file_that_still_lies_here_goes_at_the_next_start(here, storage):
    job = done(here)
    with uploading(here, storage.endpoint, linger=60.0) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    assert here.files.path(job.outputs[0].file) is not None
    with uploading(here, storage.endpoint) as uploader:
        assert uploader.pending(here.store.get(job.id)) == 0
        until(lambda: here.files.path(job.outputs[0].file) is None)
    assert here.files.elsewhere(job.outputs[0].file) == output_of(here, job).url


def test_a_database_that_fails_loses_no_file(here, storage, monkeypatch):
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        with monkeypatch.context() as patch:
            patch.setattr(type(here.store), "update_outputs", lambda *_: 1 / 0)
            uploader.add(job.id, job.outputs[0])
            until(lambda: not uploader._tracked)
        assert here.files.path(job.outputs[0].file) is not None
        uploader.pending(here.store.get(job.id))  # and its thread lives
        until(lambda: output_of(here, job).url)
