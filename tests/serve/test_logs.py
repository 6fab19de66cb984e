import json
import logging
import sys

from tinydiff.serve.guard import REQUESTS, JsonFormatter


def record(name, message, error=None):
    return logging.LogRecord(name, logging.ERROR, "", 0, message, ("x",), error)


def test_a_line_is_an_object_with_what_went_wrong():
    try:
        raise ValueError("broken")
    except ValueError:
        told = json.loads(
            JsonFormatter().format(record("tinydiff.serve", "%s failed\nbadly", sys.exc_info()))
        )
    assert (told["level"], told["logger"], told["message"]) == ("ERROR", "tinydiff.serve", "x failed\nbadly")
    assert told["time"] > 0 and "ValueError: broken" in told["trace"]


def test_the_line_of_a_request_is_one_already():
    assert JsonFormatter().format(record(REQUESTS, '{"job": "%s"}')) == '{"job": "x"}'
