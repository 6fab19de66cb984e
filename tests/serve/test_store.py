"""The store, the same tests against SQLite and a real PostgreSQL: what becomes of a job, who is next, what is
found.
"""

import random
import time
from contextlib import closing
from dataclasses import fields, replace

import pytest

from tests.serve.stored import LEASE, file, job, take
from tinydiff.serve.jobs import Busy, Failure, Job
from tinydiff.serve.sql import bytes_here
from tinydiff.serve.store import MOST_ATTEMPTS, open_store


@pytest.fixture
def store(both):
    return both


# --- one job ---


def test_a_job_comes_back_as_it_was(store):
    given = job(
        "key",
        fields={
            "prompt": "naïve \u732b \x00 \ud800 :id {skew} %s",
            "seed": 2**63 - 1,
            "guidance_scale": 0.1,
            "list": [1, None, {"a": True}],
        },
        inputs={"image_path": ("one", "two"), "mask_path": ()},
        answer={"model": "m", "size": "8x8"},
        status="failed",
        priority=-3,
        progress=40,
        started_at=1.1,
        completed_at=2.2,
        expires_at=3.3,
        error=Failure("invalid_value", "no", "seed"),
        outputs=(file(), file("g", 2**40, variant="thumbnail", url="https://x", warning="slow")),
        result={"seeds": [1, 2], "seconds": {"denoise": 0.25}},
        remixed_from="video_0",
        pinned=True,
        server="there",
        lease=4.4,
        attempts=2,
        idempotency="again",
        model="b",
    )
    plain = Job("video_plain", "video", 1.0)
    assert [
        entry.name for entry in fields(Job) if getattr(given, entry.name) == getattr(plain, entry.name)
    ] == ["kind"]  # all were tried
    assert store.add(given) == given
    assert store.get(given.id) == given


def test_a_job_goes_from_the_queue_to_files(store):
    queued = store.add(job(inputs={"image_path": ("in",)}))
    began = time.time()
    taken = store.take("here", began + 30)
    assert taken == store.get(queued.id)
    assert began <= taken.started_at <= time.time() and taken.lease == pytest.approx(began + 30, abs=5)
    assert taken == replace(
        queued,
        status="in_progress",
        server="here",
        lease=taken.lease,
        started_at=taken.started_at,
        attempts=1,
    )
    assert store.progress(queued.id, "here", 50) and store.get(queued.id).progress == 50
    assert store.finish(
        queued.id, "here", "completed", outputs=[file()], result={"seeds": [1]}, expires_at=9e9
    )
    done = store.get(queued.id)
    assert (done.status, done.progress, done.error, done.outputs, done.result) == (
        "completed",
        100,
        None,
        (file(),),
        {"seeds": [1]},
    )
    assert began <= done.completed_at <= time.time() and done.expires_at == 9e9
    assert take(store) is None


def test_a_job_is_finished_once_and_by_who_has_it(store):
    id = store.add(job()).id
    assert not store.finish(id, "here", "completed") and not store.progress(id, "here", 1)  # it is nobody's
    take(store)
    assert (
        not store.finish(id, "there", "completed")
        and not store.finish(id, "", "failed")
        and not store.progress(id, "there", 1)
    )
    assert store.finish(id, "here", "failed", error=Failure("server_error", "no"))
    assert not store.finish(id, "here", "completed", outputs=[file()]) and not store.progress(id, "here", 99)
    assert store.get(id).outputs == () and store.get(id).error == Failure("server_error", "no")
    assert not store.finish("video_none", "here", "completed")


def test_a_queued_job_is_finished_in_no_servers_name(store):
    id = store.add(job()).id
    assert store.finish(id, "", "failed", error=Failure("cancelled", "gone")) and take(store) is None
    assert store.get(id).status == "failed" and not store.finish(id, "", "failed")


def test_ids_that_no_database_can_hold_are_no_jobs(store):
    for id in ("", "\x00", "video_\x00", "\ud800", "é", "x' OR '1' = '1", ":id", "%(id)s"):
        assert store.get(id) is None and store.cancel(id) is None and not store.delete(id)
        with pytest.raises(KeyError):
            store.page("video", "", id, 1, True)


# --- the queue ---


def test_a_full_queue_refuses(where):
    with closing(open_store(*where, 2)) as store:
        first, second = store.add(job(idempotency="k")), store.add(job())
        with pytest.raises(Busy):
            store.add(job())
        assert store.add(job(idempotency="k")) == first  # to join one takes no room
        assert take(store).id == first.id
        third = store.add(job())
        with pytest.raises(Busy):
            store.add(job())
        assert store.counts() == {"queued": 2, "in_progress": 1, "completed": 0, "failed": 0}
        assert [take(store).id for _ in range(2)] == [second.id, third.id]


def test_a_shared_queue_has_room_for_every_owner(where):
    """Who fills what may be filled leaves as much again: half, then a quarter, and whoever comes finds a
    place.
    """
    with closing(open_store(*where, 16, shared=True)) as store:
        held = {}
        for owner in "abcd":
            with pytest.raises(
                Busy, match="this API key has as many waiting jobs as the queue has free places"
            ):
                while True:
                    store.add(job(owner))
                    held[owner] = held.get(owner, 0) + 1
        assert held == {"a": 8, "b": 4, "c": 2, "d": 1}
        store.add(job("e"))
        with pytest.raises(Busy, match="the queue is full"):
            store.add(job("f"))


def test_a_share_of_the_queue_is_given_back_with_each_job_that_begins(where):
    with closing(open_store(*where, 4, shared=True)) as store:
        first = [store.add(job("a", idempotency=str(k))) for k in range(2)]
        with pytest.raises(Busy):
            store.add(job("a"))
        assert store.add(job("a", idempotency="0")) == first[0]  # to join one takes no room
        assert take(store).id == first[0].id and store.add(job("a"))
        with pytest.raises(Busy):
            store.add(job("a"))


def test_a_repeated_request_joins_the_one_that_is_not_done(store):
    first = store.add(job("a", idempotency="k"))
    assert store.add(job("a", idempotency="k")) == first
    assert (
        store.add(job("b", idempotency="k")).id != first.id
        and store.add(job("a", idempotency="l")).id != first.id
    )
    assert store.add(job("a")).id != store.add(job("a")).id
    running = take(store)
    assert running.id == first.id and store.add(job("a", idempotency="k")) == running
    store.finish(first.id, "here", "completed")
    later = store.add(job("a", idempotency="k"))
    assert later.id != first.id and store.add(job("a", idempotency="k")) == later


def test_priority_then_owners_in_turn_then_age(store):
    hundred = [store.add(job("many")) for _ in range(100)]
    one = store.add(job("one"))
    urgent = store.add(job("many", priority=1))
    low = store.add(job("low", priority=-1))
    got = [take(store).id for _ in range(103)]
    assert got == [urgent.id, one.id, *(each.id for each in hundred), low.id]


def test_owners_take_turns_when_one_job_runs_at_a_time(store):
    of = {owner: [store.add(job(owner)).id for _ in range(3)] for owner in "ab"}
    order = []
    for _ in range(6):
        order.append(take(store).id)
        store.finish(order[-1], "here", "completed")
        store.delete(order[-1])  # whose turn it was is known even so
    assert order == [id for pair in zip(of["a"], of["b"], strict=True) for id in pair]


def test_who_comes_back_at_once_waits_for_the_other(store):
    late = store.add(job("late"))
    take(store), store.finish(late.id, "here", "completed")
    waiting = store.add(job("late"))
    for _ in range(3):
        again = store.add(job("quick", created_at=1.0))
        got = take(store).id
        store.finish(got, "here", "completed"), store.delete(got)
        if got == waiting.id:
            break
        assert got == again.id
    assert store.get(waiting.id) is None


def test_fewest_running_goes_before_longest_waiting(store):
    for owner in "aab":
        store.add(job(owner))
    assert [take(store).owner for _ in range(2)] == ["a", "b"]
    store.add(job("b")), store.add(job("b"))
    done = next(each for each in store.every() if each.owner == "b" and each.status == "in_progress")
    store.finish(done.id, "here", "completed")
    assert [take(store).owner for _ in range(3)] == [
        "b",
        "a",
        "b",
    ]  # b has none running, though its last start is later


def test_position_is_the_order_in_which_jobs_are_taken(store):
    rng = random.Random(0)
    for _ in range(12):
        store.add(job(rng.choice("abc")))
    while rng.random() < 0.85 and (taken := take(store)):
        if rng.random() < 0.5:
            store.finish(taken.id, "here", "completed")
    queued = [store.add(job(rng.choice("abcdef"), created_at=rng.random())) for _ in range(30)]
    queued += [each for each in store.every() if each.status == "queued" and each not in queued]
    said = sorted(queued, key=store.position)
    assert [store.position(each) for each in said] == list(range(len(queued)))
    assert [each.id for each in said] == [take(store).id for _ in queued]
    assert {store.position(each) for each in queued} == {0}


def test_position_heeds_priority(store):
    low, high = store.add(job(priority=-1)), store.add(job(priority=5))
    middle = store.add(job())
    assert [store.position(each) for each in (low, high, middle)] == [2, 0, 1]


def test_a_pinned_job_runs_at_its_server_only(store):
    pinned, free = store.add(job(pinned=True, server="there")), store.add(job())
    assert take(store).id == free.id and take(store) is None
    assert take(store, "there").id == pinned.id


# --- cancelling ---


def test_cancelling_a_queued_job_ends_it(store):
    cancelled = store.cancel(store.add(job()).id)
    assert (
        (cancelled.status, cancelled.error.code) == ("failed", "cancelled")
        and cancelled.completed_at
        and cancelled.expires_at
    )
    assert take(store) is None and store.cancel(cancelled.id) == cancelled


def test_cancelling_a_running_job_asks_its_server(store):
    id, other = store.add(job()).id, store.add(job()).id
    take(store), take(store)
    assert store.cancelled("here") == [] and store.cancel(id).status == "in_progress"
    assert store.cancelled("here") == [id] and store.cancelled("there") == []
    assert (
        store.finish(id, "here", "failed", error=Failure("cancelled", "so")) and store.cancelled("here") == []
    )
    assert store.get(other).status == "in_progress" and store.cancel("video_none") is None


def test_a_done_job_stays_as_it_is(store):
    id = store.add(job()).id
    take(store), store.finish(id, "here", "completed", outputs=[file()])
    assert store.cancel(id) == store.get(id) and store.get(id).status == "completed"


# --- servers that go away ---


def test_a_lease_that_ran_out_gives_the_job_back(store):
    id = store.add(job()).id
    taken = take(store, lease=30)
    store.progress(id, "here", 70)
    now = time.time()
    assert store.reclaim(now, "rerun") == 0 and take(store, "there") is None
    store.renew("there", now + 999)
    assert store.reclaim(now + 31, "rerun") == 1
    assert store.get(id) == replace(taken, status="queued", server="", lease=0.0, started_at=None, progress=0)
    assert not store.finish(id, "here", "completed") and not store.progress(
        id, "here", 80
    )  # the one that was gone wakes up
    assert take(store, "there").attempts == 2
    assert not store.finish(id, "here", "completed") and store.finish(id, "there", "completed")


def test_a_renewed_lease_holds(store):
    store.add(job())
    take(store, lease=30)
    store.renew("here", time.time() + 90)
    assert store.reclaim(time.time() + 60, "rerun") == 0 and store.reclaim(time.time() + 120, "rerun") == 1
    store.renew("here", time.time() + 90)  # it has none now
    assert take(store, "there") is not None


def test_what_is_left_fails_where_the_policy_says_so(store):
    id = store.add(job()).id
    take(store)
    assert store.reclaim(time.time() + 2 * LEASE, "fail") == 1
    failed = store.get(id)
    assert (failed.status, failed.error.code) == (
        "failed",
        "server_restarted",
    ) and failed.expires_at > time.time()


@pytest.mark.parametrize("policy", ["rerun", "fail"])
def test_requeue_lets_go_of_one_servers_jobs(store, policy):
    running, waiting, theirs, asked, pinned = (store.add(job(priority=-n)).id for n in range(5))
    take(store), take(store, "pause")
    assert store.requeue("pause", "rerun") == 1  # nothing of `here`
    store.cancel(waiting)
    take(store, "there"), take(store)
    store.cancel(asked)
    pinned = [store.add(job(pinned=True, server="here")).id for _ in range(2)]
    store.add(job(pinned=True, server="there"))
    assert take(store).id == pinned[0]
    assert store.requeue("here", policy) == 4
    found = {id: store.get(id) for id in (running, asked, *pinned)}
    assert (found[running].status, found[running].server) == (
        ("queued", "") if policy == "rerun" else ("failed", "here")
    )
    assert [found[id].error.code for id in (asked, *pinned)] == [
        "cancelled",
        "server_restarted",
        "server_restarted",
    ]
    assert store.get(theirs).status == "in_progress" and store.requeue("here", policy) == 0


def test_a_waiting_pinned_job_fails_with_its_server(store):
    id = store.add(job(pinned=True, server="gone")).id
    assert store.reclaim(time.time() + 9e6, "rerun") == 0  # its server has yet to say that it lives
    store.renew("gone", time.time() + 30)
    assert store.reclaim(time.time() + 20, "rerun") == 0
    assert store.reclaim(time.time() + 40, "rerun") == 1
    assert store.get(id).error.code == "server_restarted"


def test_a_job_that_brings_servers_down_is_given_up(store):
    id = store.add(job()).id
    for _ in range(MOST_ATTEMPTS):
        assert store.get(id).status == "queued"
        take(store), store.reclaim(time.time() + 2 * LEASE, "rerun")
    failed = store.get(id)
    assert (failed.status, failed.error.code, failed.attempts) == (
        "failed",
        "server_restarted",
        MOST_ATTEMPTS,
    )


# --- reading ---


@pytest.mark.parametrize("ascending", [True, False])
def test_pages_are_whole_while_jobs_come(store, ascending):
    given = [store.add(job("a", created_at=float(n // 3))) for n in range(10)]  # three at a time
    store.add(job("b")), store.add(job("a", kind="image"))
    seen, after, more = [], None, True
    while more:
        jobs, more = store.page("video", "a", after, 3, ascending)
        seen, after = seen + jobs, jobs[-1].id
        store.add(job("a", created_at=-1.0 if ascending else 99.0))  # on the side that was read
    assert seen == (given if ascending else given[::-1])


def test_a_page_ends_and_knows_its_cursor(store):
    mine, theirs = store.add(job("a")), store.add(job("b"))
    assert store.page("video", "a", None, 1, False) == ([mine], False)
    assert store.page("video", "a", mine.id, 5, False) == ([], False) and store.page(
        "video", "c", None, 5, True
    ) == ([], False)
    for kind, owner, after in (
        ("video", "a", "video_none"),
        ("video", "a", theirs.id),
        ("image", "a", mine.id),
    ):
        with pytest.raises(KeyError):
            store.page(kind, owner, after, 5, True)


def total_bytes(store):
    return sum(bytes_here(job.outputs) for job in store.every())


def test_old_jobs_and_their_bytes(store):
    def done(status="completed", outputs=(), expires_at=None):
        id = store.add(job()).id
        take(store), store.finish(id, "here", status, outputs=outputs, expires_at=expires_at)
        return id

    assert (total_bytes(store), store.oldest(), store.expired(9e9)) == (0, None, [])
    waiting = store.add(job(priority=-1)).id
    bare, late, soon = (
        done(),
        done(outputs=[file(size=2**40), file(size=5)], expires_at=200.0),
        done("failed", [file(size=1)], 100.0),
    )
    assert total_bytes(store) == 2**40 + 6 and store.oldest().id == late
    assert [[each.id for each in store.expired(now)] for now in (99.0, 100.0, 200.0)] == [
        [],
        [soon],
        [soon, late],
    ]
    assert store.get(bare).expires_at == pytest.approx(
        time.time() + 86400, abs=60
    )  # so none is kept for ever
    assert store.update_outputs(late, (file(size=2**40, url="https://bucket"), file(size=5)))
    assert total_bytes(store) == 6 and store.get(late).outputs[0].url == "https://bucket"
    assert store.update_outputs(late, ()) and store.oldest().id == soon and total_bytes(store) == 1
    assert not store.update_outputs(waiting, [file()]) and not store.update_outputs("video_none", [file()])
    assert (
        store.delete(soon) and not store.delete(soon) and store.oldest() is None and store.get(soon) is None
    )
    assert store.counts() == {"queued": 1, "in_progress": 0, "completed": 2, "failed": 0}
    assert {each.id for each in store.every()} == {waiting, bare, late}


def test_a_deleted_job_is_nobodys(store):
    id = store.add(job()).id
    take(store)
    assert (
        store.delete(id) and not store.progress(id, "here", 5) and not store.finish(id, "here", "completed")
    )
