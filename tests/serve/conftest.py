"""For all tests of the server: stores in SQLite, and in a real PostgreSQL; a browser."""

from contextlib import closing

import pytest

from tests.serve.chromium import browser, serve  # noqa: F401  fixtures
from tests.serve.node import package  # noqa: F401  a fixture
from tests.serve.postgres import database, postgres, postgres_url  # noqa: F401  fixtures
from tests.serve.turns import turns  # noqa: F401  a fixture
from tinydiff.serve.store import open_store


@pytest.fixture(params=["sqlite", "postgres"])
def where(request, tmp_path):
    """What `open_store` is told first: a test that asks runs with both."""
    return tmp_path, request.getfixturevalue("database") if request.param == "postgres" else None


@pytest.fixture
def both(where):
    """An empty store, in SQLite and then in PostgreSQL."""
    with closing(open_store(*where, 1000)) as store:
        yield store
