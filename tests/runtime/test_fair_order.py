"""The order in which waiting images run: a simulation that counts steps."""

from dataclasses import dataclass

from tinydiff.runtime.fair_order import fair_order


@dataclass(eq=False)
class Image:
    owner: str
    job: str
    steps: int = 4
    priority: int = 0
    started: bool = False

    @property
    def turn_key(self):
        return self.owner, self.job


def images(owner, job, count=1, **more):
    return [Image(owner, job, **more) for _ in range(count)]


def run(waiting, most, arrivals=()):
    """(job, number of the step that ended it) of each image, in the order in which they end. arrivals:
    (before which step, images).
    """
    waiting, arrivals, turns, ended, step = list(waiting), dict(arrivals), {}, [], 0
    while waiting or any(at > step for at in arrivals):
        waiting += arrivals.get(step, [])
        step += 1
        for one in fair_order(waiting, turns)[:most]:
            if not one.started:
                one.started = True
                turns[one.turn_key] = turns[one.turn_key[:1]] = max(turns.values(), default=0) + 1
            one.steps -= 1
        ended += [(one.job, step) for one in waiting if not one.steps]
        waiting = [one for one in waiting if one.steps]
    return ended


def test_another_key_s_image_begins_at_once_beside_a_large_job():
    ended = run(images("a", "large", 8), 4, [(1, images("b", "small"))])
    assert (
        ended.index(("small", 5)) == 3
    )  # it took its 4 steps from its arrival on, while one image of the large job paused
    assert ended[:3] == [("large", 4)] * 3 and len(ended) == 9


def test_one_at_a_time_the_other_key_is_next():
    ended = run(images("a", "large", 5), 1, [(2, images("b", "small", 2))])
    assert [job for job, _ in ended] == ["large", "small", "large", "small", "large", "large", "large"]


def test_a_key_s_many_jobs_have_together_what_another_s_one_has():
    many = [one for k in range(6) for one in images("a", f"a{k}")]
    ended = run(many, 1, [(1, images("b", "b", 3))])
    assert [job for job, _ in ended] == ["a0", "b", "a1", "b", "a2", "b", "a3", "a4", "a5"]


def test_jobs_of_one_key_take_turns():
    ended = run(images("", "large", 4), 1, [(1, images("", "small")), (2, images("", "other"))])
    assert [job for job, _ in ended] == ["large", "small", "other", "large", "large", "large"]


def test_equal_requests_are_done_one_after_another_as_they_came():
    ended = run([one for k in range(4) for one in images("", str(k))], 1)
    assert ended == [("0", 4), ("1", 8), ("2", 12), ("3", 16)]


def test_the_highest_priority_goes_before_every_turn():
    ended = run(images("a", "low"), 1, [(1, images("a", "high", priority=1))])
    assert ended == [("high", 5), ("low", 8)]
