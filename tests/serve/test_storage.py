"""Outputs in object storage, over HTTP."""

from __future__ import annotations

import base64
import hashlib
from types import SimpleNamespace

import pytest

from tests.serve.bucket import DATA, done, keeping, output_of, serving_storage, until, uploading
from tinydiff.environment import CLOUD_STORAGE
from tinydiff.records import UserError
from tinydiff.serve.storage import S3, Uploader, client, from_environment

SET = {
    "CLOUD_STORAGE_TYPE": "s3",
    "S3_BUCKET_NAME": "b",
    "S3_ACCESS_KEY_ID": "k",
    "S3_SECRET_ACCESS_KEY": "hush",
}


# --- the environment ---


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables: (prefix, names and values)."""
    for name in CLOUD_STORAGE:
        for prefix in ("TINYDIFF_", "SGLANG_"):
            monkeypatch.delenv(prefix + name, raising=False)

    def put(prefix: str, **values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"{prefix}_{name}", value)

    return put


def test_without_variables_there_is_no_bucket(environment):
    assert from_environment() is None


@pytest.mark.parametrize("prefix", ["TINYDIFF", "SGLANG"])
def test_the_variables_make_a_bucket(environment, prefix):
    environment(prefix, **SET, S3_ENDPOINT_URL="https://minio.example.com/", S3_REGION_NAME="eu-west-1")
    assert from_environment() == S3("b", "k", "hush", "https://minio.example.com", "eu-west-1")


def test_endpoint_and_region_may_be_left_out(environment):
    environment("SGLANG", **SET)
    assert from_environment() == S3("b", "k", "hush", None, "us-east-1")


def test_our_own_variable_wins(environment):
    environment("SGLANG", **SET)
    environment("TINYDIFF", S3_BUCKET_NAME="ours")
    assert from_environment().bucket == "ours"


def test_an_empty_variable_is_none(environment):
    environment("SGLANG", **SET)
    environment("TINYDIFF", S3_BUCKET_NAME="")
    assert from_environment().bucket == "b"


@pytest.mark.parametrize("missing", sorted(SET))
def test_a_missing_partner_is_said(environment, missing):
    environment("TINYDIFF", **{name: value for name, value in SET.items() if name != missing})
    with pytest.raises(UserError, match=rf"TINYDIFF_{missing} \(or SGLANG_{missing}\): is not set") as caught:
        from_environment()
    assert caught.value.field == missing and "hush" not in str(caught.value)


@pytest.mark.parametrize(("kind", "hint"), [("gcs", ""), ("s33", "; did you mean 's3'?")])
def test_an_unknown_type_is_said(environment, kind, hint):
    environment("TINYDIFF", **SET | {"CLOUD_STORAGE_TYPE": kind})
    with pytest.raises(UserError) as caught:
        from_environment()
    assert str(caught.value).endswith(f"{kind!r} is not one of s3{hint}")


@pytest.mark.parametrize(
    "endpoint",
    [
        "minio.example.com",
        "ftp://a",
        "https://",
        "https://key:hush@a",
        "http://a?x=1",
        "http://a:x",
        "http://[",
    ],
)
def test_an_endpoint_that_is_no_url_is_said(environment, endpoint):
    environment("TINYDIFF", **SET, S3_ENDPOINT_URL=endpoint)
    with pytest.raises(UserError, match="must be a URL") as caught:
        from_environment()
    assert caught.value.field == "S3_ENDPOINT_URL" and "hush" not in str(caught.value)


def test_keys_are_not_shown():
    assert "hush" not in repr(S3("b", "visible", "hush")) and "visible" not in repr(
        S3("b", "visible", "hush")
    )


def test_urls_of_objects():
    assert (
        S3("b", "k", "s", "http://h:9000").url("tinydiff/a b/c.png") == "http://h:9000/b/tinydiff/a%20b/c.png"
    )
    assert (
        S3("b", "k", "s", None, "eu-west-1").url("x/y.png") == "https://b.s3.eu-west-1.amazonaws.com/x/y.png"
    )


# --- uploads ---


@pytest.fixture
def here(tmp_path):
    with keeping(tmp_path) as made:
        yield made


@pytest.fixture
def storage():
    with serving_storage() as made:
        yield made


@pytest.fixture(scope="module")
def moto():
    """The endpoint of moto's S3, with the bucket "images"."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="hush",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="images")
    yield SimpleNamespace(endpoint=endpoint, client=client)
    server.stop()


def test_an_output_lies_in_s3_and_its_job_says_where(here, moto):
    job = done(here)
    [output] = job.outputs
    with uploading(here, moto.endpoint) as uploader:
        uploader.add(job.id, output)
        found = until(lambda: (new := output_of(here, job)).url and new)
        until(lambda: here.files.path(output.file) is None)
    key = f"tinydiff/{job.id}/{output.file}"
    assert found.url == f"{moto.endpoint}/images/{key}" and found.warning is None
    there = moto.client.get_object(Bucket="images", Key=key)
    assert there["Body"].read() == DATA and there["ContentType"] == "image/png"
    assert here.files.elsewhere(output.file) == found.url


def test_a_large_video_arrives_whole(here, moto):
    data = bytes(range(256)) * 40_000
    job = done(here, data=data)
    with uploading(here, moto.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    there = moto.client.get_object(Bucket="images", Key=f"tinydiff/{job.id}/{job.outputs[0].file}")
    assert hashlib.sha256(there["Body"].read()).digest() == hashlib.sha256(data).digest()


def test_a_deleted_job_leaves_nothing_there(here, moto):
    job = done(here)
    with uploading(here, moto.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
        uploader.remove(here.store.get(job.id))
        until(
            lambda: (
                "Contents" not in moto.client.list_objects_v2(Bucket="images", Prefix=f"tinydiff/{job.id}/")
            )
        )


def test_a_bucket_that_is_not_there(here, moto):
    job = done(here)
    uploader = Uploader(S3("nobodys", "key", "hush", moto.endpoint), here.files, here.store, pauses=(60.0,))
    uploader.add(job.id, job.outputs[0])
    assert "the storage answered NoSuchBucket" in until(lambda: output_of(here, job).warning)
    uploader.close(5.0)


def test_the_outputs_of_a_job_do_not_forget_each_other(here, storage):
    job = done(here, count=12)
    with uploading(here, storage.endpoint, threads=4) as uploader:
        for output in job.outputs:
            uploader.add(job.id, output)
        until(lambda: all(output.url for output in here.store.get(job.id).outputs))
    assert len(storage.objects) == 12


def test_the_upload_carries_type_and_checksums(here, storage):
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    data, headers = storage.objects[f"/images/tinydiff/{job.id}/{job.outputs[0].file}"]
    assert data == DATA and headers["Content-Type"] == "image/png"
    assert base64.b64decode(headers["x-amz-checksum-sha256"]) == hashlib.sha256(DATA).digest()
    assert base64.b64decode(headers["Content-MD5"]) == hashlib.md5(DATA).digest()


def test_the_bucket_at_amazon_is_at_amazon(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert (
        client(S3("images", "key", "hush", None, "eu-west-1"), 1, 1.0).meta.endpoint_url
        == "https://s3.eu-west-1.amazonaws.com"
    )


def test_the_environment_of_other_programs_is_not_asked(here, storage, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    job = done(here)
    with uploading(here, storage.endpoint) as uploader:
        uploader.add(job.id, job.outputs[0])
        until(lambda: output_of(here, job).url)
    assert "Credential=key/" in next(iter(storage.objects.values()))[1]["Authorization"]
