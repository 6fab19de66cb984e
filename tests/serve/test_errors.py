import falcon
import pytest
from falcon import testing

from tinydiff.records import UserError
from tinydiff.serve import errors
from tinydiff.serve.errors import Refusal
from tinydiff.serve.jobs import Busy, Failure, Stopping, Unreachable


class Raises:
    def __init__(self, error):
        self.error = error

    def on_get(self, req, resp):
        raise self.error


def answer(error, path="/it", **more):
    app = falcon.App()
    errors.install(app)
    app.add_route("/it", Raises(error))
    return testing.TestClient(app).simulate_request(path=path, **{"method": "GET", **more})


@pytest.mark.parametrize(
    ("error", "status", "type", "code", "param"),
    [
        (UserError("size", "size: no"), 400, "invalid_request_error", "invalid_value", "size"),
        (UserError("state_dir", "state_dir: the disk is full"), 507, "server_error", "storage_failed", None),
        (
            Refusal(404, "model_not_found", "no", "model"),
            404,
            "invalid_request_error",
            "model_not_found",
            "model",
        ),
        (Refusal(401, "invalid_api_key", "no"), 401, "authentication_error", "invalid_api_key", None),
        (Busy(2.5), 429, "rate_limit_error", "queue_full", None),
        (Stopping(), 503, "server_error", "stopping", None),
        (Unreachable("x"), 503, "server_error", "store_unreachable", None),
        (
            falcon.HTTPBadRequest(title="Bad", description="worse"),
            400,
            "invalid_request_error",
            "invalid_request",
            None,
        ),
        (falcon.HTTPUnsupportedMediaType(), 415, "invalid_request_error", "unsupported_media_type", None),
        (falcon.HTTPRangeNotSatisfiable(10), 416, "invalid_request_error", "invalid_request", None),
        (RuntimeError("secret /path"), 500, "server_error", "server_error", None),
    ],
)
def test_every_error_has_openais_form(error, status, type, code, param):
    found = answer(error)
    assert (found.status_code, found.headers["content-type"]) == (status, "application/json")
    assert {name: value for name, value in found.json["error"].items() if name != "message"} == {
        "type": type,
        "code": code,
        "param": param,
    }
    assert found.json.keys() == {"error"}
    assert found.json["error"]["message"]


def test_a_fault_of_ours_tells_nothing_but_is_logged(caplog):
    assert "secret" not in answer(RuntimeError("secret /path")).text
    assert "secret /path" in caplog.text


def test_a_url_that_is_not_there_and_a_method_that_is_not_are_refused():
    assert answer(None, "/no/such").json["error"]["code"] == "not_found"
    found = answer(None, method="DELETE")
    assert (found.status_code, found.json["error"]["code"], found.headers["allow"]) == (
        405,
        "method_not_allowed",
        "GET, OPTIONS",
    )


def test_a_full_queue_says_when_to_come_back():
    headers = answer(Busy(2.5)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "2500")
    assert "x-should-retry" not in headers


@pytest.mark.parametrize(
    ("failure", "status", "retried"),
    [
        (Failure("cancelled", "m"), 409, False),
        (Failure("insufficient_memory", "m"), 507, False),
        (Failure("invalid_value", "m", "size"), 400, False),
        (Failure("server_error", "m"), 500, False),
        (Failure("storage_failed", "m"), 507, False),
        (Failure("server_restarted", "m"), 503, True),
    ],
)
def test_only_a_restart_is_worth_trying_again(failure, status, retried):
    found = answer(errors.of_failure(failure))
    assert (found.status_code, found.json["error"]["code"], found.json["error"]["param"]) == (
        status,
        failure.code,
        failure.param,
    )
    assert found.headers.get("x-should-retry") == (None if retried else "false")
