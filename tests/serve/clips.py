"""Asking for videos in tests, over HTTP, of a server whose scheduler is made up."""

import base64
import time

from tests.serve import fake

SMALL = {"prompt": "a red circle", "size": "64x48", "seconds": "1"}
PICTURE = fake.picture(64, 48)
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
PARTS = [("prompt", "x", None), ("size", "64x48", None), ("seconds", "1", None)]


def create(client, **fields):
    """A video that was just asked for, as the client sees it."""
    answer = client.simulate_post("/v1/videos", json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json


def until(client, id, *status):
    """The video once its status is one of these."""
    for _ in range(1000):
        now = client.simulate_get(f"/v1/videos/{id}").json
        if now["status"] in status:
            return now
        time.sleep(0.01)
    raise AssertionError(f"{id} is {now['status']} after 10 s, not {status}")


def finished(client, **fields):
    """A video that was made."""
    return until(client, create(client, **fields)["id"], "completed")


def error(answer):
    """(status, code, param)."""
    return answer.status_code, answer.json["error"]["code"], answer.json["error"]["param"]


def form(*parts):
    """A multipart body of (name, value, filename or None)."""
    lines = []
    for name, value, filename in parts:
        file = f'; filename="{filename}"\r\nContent-Type: application/octet-stream' if filename else ""
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        lines.append(head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n")
    return {"body": b"".join(lines) + b"--edge--\r\n", "content_type": "multipart/form-data; boundary=edge"}


def kept(made):
    """Names of all files that the server keeps."""
    return sorted(path.name for path in made.files.folder.iterdir()) if made.files.folder.exists() else []
