"""How many images are made together, by measured step times."""

from tinydiff.runtime.pace import AGAIN, FORMS, TRIES, Pace


def test_sizes_double_as_long_as_that_pays():
    pace = Pace()
    tried = []
    for _ in range(6):
        count = pace.size("small", 8)
        tried.append(count)
        pace.measured("small", count, 1.0)  # a step costs the same however many there are
    assert tried == [1, 2, 4, 8, 8, 8]


def test_where_it_does_not_pay_pictures_are_made_alone():
    pace = Pace()
    tried = []
    for _ in range(6):
        count = pace.size("large", 8)
        tried.append(count)
        pace.measured("large", count, float(count))
    assert tried == [1, *[2] * TRIES, 1, 1]


def test_what_did_not_pay_is_tried_again_in_time_and_stays_once_it_does():
    pace = Pace()
    tried = []
    for i in range(3 * AGAIN):
        count = pace.size("a", 2)
        tried.append(count)
        pace.measured("a", count, 1.0 if count == 1 or i > AGAIN + TRIES else 4.0)  # two became cheaper
    assert tried[TRIES + 1 : AGAIN] == [1] * (AGAIN - TRIES - 1)
    assert tried[AGAIN + TRIES : 2 * AGAIN] == [1] * (AGAIN - TRIES)
    assert tried[2 * AGAIN :] == [2] * AGAIN


def test_what_did_not_fit_into_memory_is_not_tried_again_until_told():
    pace = Pace()
    for count in (1, 2, 4):
        pace.measured("a", count, 1.0)
    pace.too_many("a", 4)
    assert pace.size("a", 8) == 3
    pace.enough("a")
    assert pace.size("a", 8) == 8


def test_a_slow_step_in_between_changes_nothing():
    pace = Pace()
    for count, seconds in ((1, 1.0), (2, 1.0), (2, 9.0), (1, 5.0)):
        pace.measured("a", count, seconds)
    assert pace.size("a", 2) == 2
    assert pace.step("a", 2) == 1.0


def test_forms_are_forgotten_in_the_end():
    pace = Pace()
    for form in range(2 * FORMS):
        pace.measured(form, 1, 1.0)
    assert len(pace.table()) == FORMS
    assert pace.step(0, 1) is None and pace.step(2 * FORMS - 1, 1) == 1.0
