"""Given images are decoded in other processes: few at once, each with an end, one time each."""

from __future__ import annotations

import json
import sys
import threading

import pytest
from falcon import testing

from tests.serve import fake
from tests.serve.counting import counting
from tests.serve.fake import form, picture, service
from tinydiff.records import UserError
from tinydiff.runtime import admit
from tinydiff.serve import admission, decoder
from tinydiff.serve.app import make_app
from tinydiff.serve.decoder import Decoder
from tinydiff.serve.service import AdmittedRequests, image_bytes

EDITS, VIDEOS = "/v1/images/edits", "/v1/videos"
FORM = {"Content-Type": "multipart/form-data; boundary=B"}
MOST = 1e6


@pytest.fixture
def own():
    made = Decoder()
    yield made
    made.close()


def test_a_process_reads_one_image_after_another(own):
    for size in (8, 9):
        assert (
            own.pixels(picture(size, size, (1, 2, 3)), "image", MOST).tolist() == [[[1, 2, 3]] * size] * size
        )
    assert len(own._idle) == 1


def test_a_mistake_is_reported_and_the_process_stays(own):
    with pytest.raises(
        UserError, match=r"^mask: has 2000x1000 pixels; at most 1,000,000 are allowed"
    ) as caught:
        own.pixels(picture(2000, 1000), "mask", MOST)
    assert caught.value.field == "mask" and len(own._idle) == 1


def test_a_process_ends_after_a_large_image(own):
    assert own.pixels(picture(2200, 2200), "image", 1e7).shape == (2200, 2200, 3)
    assert own._idle == []


def test_a_process_that_does_not_answer_is_killed():
    stuck = Decoder(0.05, [sys.executable, "-c", "import threading; threading.Event().wait()"])
    with pytest.raises(UserError, match="needs more time or memory to decode than this server allows"):
        stuck.pixels(picture(), "image", MOST)
    assert stuck._idle == []


def test_a_process_that_died_meanwhile_is_not_asked(own):
    own.pixels(picture(), "image", MOST)
    own._idle[0].kill()
    own._idle[0].wait()
    assert own.pixels(picture(), "image", MOST).shape == (128, 128, 3)


def test_a_process_that_wants_too_much_memory_does_not_get_it():
    greedy = decoder.PROGRAM.replace(
        "unpack.main()", "unpack.pixels = lambda *_, **more: bytearray(2**33); unpack.main()"
    )
    hungry = Decoder(command=[sys.executable, "-c", greedy, json.dumps(sys.path)])
    with pytest.raises(UserError, match="needs more time or memory to decode than this server allows"):
        hungry.pixels(picture(), "image", MOST)
    assert hungry._idle == []


def test_two_requests_at_most_have_images_decoded():
    inside, most, full = 0, 0, threading.Event()
    lock, leave = threading.Lock(), threading.Event()

    def work():
        nonlocal inside, most
        with decoder.slot():
            with lock:
                inside += 1
                most = max(most, inside)
                if inside == decoder.AT_ONCE:
                    full.set()
            leave.wait(10)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert full.wait(10)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert most == decoder.AT_ONCE


def test_what_is_decoded_is_returned(monkeypatch):
    given_back = []
    monkeypatch.setattr(decoder, "_trim", lambda: given_back.append(True))
    with pytest.raises(ValueError), decoder.slot():
        raise ValueError
    assert given_back == [True]


# --- in a server ---


@pytest.fixture
def made(tmp_path):
    found = service(tmp_path, row={"images": (0, 2), "image_use": "start"})
    yield found
    found.scheduler.close()


@pytest.fixture
def decoded(monkeypatch):
    """Which thread had which field decoded."""
    calls = []
    really = Decoder.pixels

    def pixels(self, data, field, *more):
        calls.append((field, threading.current_thread()))
        return really(self, data, field, *more)

    monkeypatch.setattr(Decoder, "pixels", pixels)
    return calls


def client(made):
    return testing.TestClient(make_app(made), {"Host": "localhost", **FORM})


def test_an_image_is_decoded_once_and_not_where_it_is_made(made, decoded):
    parts = form(("prompt", "a"), ("image", picture()), ("mask", picture(mode="RGBA", colour=(0, 0, 0, 0))))
    answer = client(made).simulate_post(EDITS, body=parts)
    assert answer.status_code == 200, answer.text
    assert decoded == [("image_path", threading.current_thread()), ("mask_path", threading.current_thread())]


def test_a_remix_has_its_image_decoded_once_more(tmp_path, decoded):
    made = service(tmp_path)
    first = client(made).simulate_post(VIDEOS, body=form(("prompt", "a"), ("input_reference", picture())))
    assert first.status_code == 200, first.text
    again = client(made).simulate_post(f"{VIDEOS}/{first.json['id']}/remix", body=form(("prompt", "b")))
    fake.eventually(lambda: made.store.get(again.json["id"]).status == "completed")
    assert decoded == [("image_path", threading.current_thread())] * 2
    made.scheduler.close()


def test_a_request_that_is_refused_holds_nothing(made):
    made.scheduler.busy = 3.0
    assert (
        client(made).simulate_post(EDITS, body=form(("prompt", "a"), ("image", picture()))).status_code == 429
    )
    assert made.requests._requests == {} and made.requests._bytes == 0


def test_what_is_handed_over_is_bounded(made):
    requests = [
        admit.admit(made.blueprint, admission.options({"prompt": "a", "image_path": str(path)}).sampling)
        for path in files(made)
    ]
    held = AdmittedRequests(image_bytes(requests[0][0]) * 3 // 2)
    for number, [request] in enumerate(requests):
        held.put(str(number), request)
    assert held.take("0") is None and held.take("1") is None
    assert held.take("2") is requests[2][0] and held.take("2") is None and held._bytes == 0


def files(made):
    return [made.files.path(made.files.put(picture(), "image/png", "given", "")) for _ in range(3)]


# --- pixels that are asked for ---

HUGE = [
    (
        "size=32768x32768 of a small image",
        [("size", "32768x32768"), ("image", picture(64, 64))],
        "size",
        "1,073,741,824 pixels",
    ),
    ("a very wide image", [("image", picture(1_000_000, 1))], "image", "1000000x1 pixels, too long"),
    ("a very tall image", [("image", picture(1, 1_000_000))], "image", "1x1000000 pixels, too long"),
    (
        "a very wide mask",
        [("image", picture(64, 64)), ("mask", picture(1_000_000, 1))],
        "mask",
        "1000000 x 1",
    ),
]


@pytest.mark.parametrize(
    ("parts", "param", "said"), [case[1:] for case in HUGE], ids=[case[0] for case in HUGE]
)
def test_pixels_are_counted_before_an_image_is_brought_to_size(made, parts, param, said):
    with counting() as cost:
        answer = client(made).simulate_post(EDITS, body=form(("prompt", "a"), *parts))
    assert answer.status_code == 400, answer.text
    error = answer.json["error"]
    assert error["param"] == param and said in error["message"]
    assert cost.bytes < 2**24


def test_references_of_an_aspect_that_no_canvas_has_are_refused(tmp_path):
    made = service(tmp_path, row={"images": (1, 4), "image_use": "references", "reference_multiple": 32})
    answer = client(made).simulate_post(EDITS, body=form(("prompt", "a"), ("image", picture(100_000, 1))))
    assert answer.status_code == 400 and "too long" in answer.json["error"]["message"]
    made.scheduler.close()
