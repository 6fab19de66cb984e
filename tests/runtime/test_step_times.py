"""How many images are made together, by measured step times."""

from tinydiff.runtime.step_times import MAX_KINDS, RETRY_EVERY, TRIES, StepTimes


def test_sizes_double_as_long_as_that_pays():
    step_times = StepTimes()
    tried = []
    for _ in range(6):
        count = step_times.batch_size("small", 8)
        tried.append(count)
        step_times.record("small", count, 1.0)  # a step costs the same however many there are
    assert tried == [1, 2, 4, 8, 8, 8]


def test_where_it_does_not_pay_images_are_made_alone():
    step_times = StepTimes()
    tried = []
    for _ in range(6):
        count = step_times.batch_size("large", 8)
        tried.append(count)
        step_times.record("large", count, float(count))
    assert tried == [1, *[2] * TRIES, 1, 1]


def test_what_did_not_pay_is_tried_again_in_time_and_stays_once_it_does():
    step_times = StepTimes()
    tried = []
    for i in range(3 * RETRY_EVERY):
        count = step_times.batch_size("a", 2)
        tried.append(count)
        step_times.record(
            "a", count, 1.0 if count == 1 or i > RETRY_EVERY + TRIES else 4.0
        )  # two became cheaper
    assert tried[TRIES + 1 : RETRY_EVERY] == [1] * (RETRY_EVERY - TRIES - 1)
    assert tried[RETRY_EVERY + TRIES : 2 * RETRY_EVERY] == [1] * (RETRY_EVERY - TRIES)
    assert tried[2 * RETRY_EVERY :] == [2] * RETRY_EVERY


def test_what_did_not_fit_into_memory_is_not_tried_again_by_itself():
    step_times = StepTimes()
    for count in (1, 2, 4):
        step_times.record("a", count, 1.0)
    step_times.limit_below("a", 4)
    assert step_times.batch_size("a", 8) == 3
    step_times.unlimit("a")
    assert step_times.batch_size("a", 8) == 8


def test_a_slow_step_in_between_changes_nothing():
    step_times = StepTimes()
    for count, seconds in ((1, 1.0), (2, 1.0), (2, 9.0), (1, 5.0)):
        step_times.record("a", count, seconds)
    assert step_times.batch_size("a", 2) == 2
    assert step_times.seconds("a", 2) == 1.0


def test_forms_are_forgotten_in_the_end():
    step_times = StepTimes()
    for kind in range(2 * MAX_KINDS):
        step_times.record(kind, 1, 1.0)
    assert len(step_times.table()) == MAX_KINDS
    assert step_times.seconds(0, 1) is None and step_times.seconds(2 * MAX_KINDS - 1, 1) == 1.0
