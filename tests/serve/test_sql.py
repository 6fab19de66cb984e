"""Opening a store: tables made, brought up to date or refused, and every mistake in one sentence."""

import subprocess
import sys
from contextlib import closing

import pytest

from tests.serve.stored import at_once, job
from tinydiff.records import UserError
from tinydiff.serve import sql
from tinydiff.serve.store import open_store


def test_jobs_are_there_when_a_store_is_opened_again(where):
    with closing(open_store(*where, 5)) as store:
        given = store.add(job())
    with closing(open_store(*where, 5)) as store:
        assert store.get(given.id) == given
    assert store.get(given.id) == given  # a closed one opens by itself, so that a late answer is one
    store.close()


def test_the_tables_of_a_newer_version_are_refused(where, monkeypatch):
    field = "state_dir" if where[1] is None else "state_url"
    with monkeypatch.context() as patched:
        patched.setattr(sql, "STEPS", (*sql.STEPS, ("CREATE TABLE tinydiff_more (id TEXT)",)))
        open_store(*where, 5).close()
    with pytest.raises(
        UserError, match=rf"{field}: .* newer tinydiff \(version 3, not 2\); upgrade tinydiff"
    ) as caught:
        open_store(*where, 5)
    assert caught.value.field == field


def test_older_tables_are_brought_up_to_date(where, monkeypatch):
    with closing(open_store(*where, 5)) as store:
        given = store.add(job())
        monkeypatch.setattr(
            sql,
            "STEPS",
            (*sql.STEPS, ("ALTER TABLE tinydiff_jobs ADD COLUMN more TEXT DEFAULT 'x' NOT NULL",)),
        )
        with closing(open_store(*where, 5)) as newer:
            assert newer.get(given.id) == given and newer._select("SELECT more FROM tinydiff_jobs") == [
                ("x",)
            ]


def test_stores_opened_at_once_make_the_tables_once(where):
    for store in at_once(lambda i: open_store(*where, 5), 4):
        assert store.counts()["queued"] == 0
        store.close()


def test_a_directory_that_cannot_hold_jobs_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "jobs.sqlite3").write_text("not a database, but as long as one would be " * 100)
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="state_dir: cannot store jobs in ") as caught:
            open_store(folder, None, 5)
        assert caught.value.field == "state_dir" and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:secret@host/db", "'mysql://host/db' must have the form postgresql://USER"),
        ("", "'' must have the form"),
        (
            "postgresql://me:secret@127.0.0.1:1/db?connect_timeout=1",
            "cannot use the database 'postgresql://127.0.0.1:1/db': .*refused",
        ),
        (
            "postgresql://me:secret@host/db?nonsense=1",
            "cannot use the database 'postgresql://host/db': .*nonsense",
        ),
    ],
)
def test_a_url_that_is_none_is_reported_without_its_password(tmp_path, url, said):
    with pytest.raises(UserError, match=f"^state_url: {said}") as caught:
        open_store(tmp_path, url, 5)
    assert (
        caught.value.field == "state_url"
        and "secret" not in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_missing_psycopg_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        UserError, match=r"state_url: 'postgresql://host/db' needs psycopg.*pip install 'psycopg\[binary\]'"
    ):
        open_store(tmp_path, "postgresql://host/db", 5)


def test_the_store_loads_no_torch():
    code = (
        "import sys, tinydiff.serve.store; print([name for name in ('torch', 'numpy', 'psycopg') if "
        "name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )
