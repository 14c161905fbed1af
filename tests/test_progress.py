"""Progress is silent unless somebody listens, and threads do not hear each other."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.progress import Pace, listen, report, track


class Heard(list):
    def __call__(self, what, done, total):
        self.append((what, done, total))


def test_nobody_listens_and_nothing_happens(capsys):
    report("work", 1, 2)
    assert list(track([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_listener_hears_all_of_a_with_and_nothing_after_it():
    with listen(heard := Heard()):
        report("work", 0.5)
    report("work", 1.0)
    assert heard == [("work", 0.5, None)]


@given(st.lists(st.integers(), max_size=6))
def test_each_item_is_reported_once_it_is_finished(items):
    with listen(heard := Heard()):
        for i, item in enumerate(track(items, "work")):
            assert item == items[i]
            assert heard[-1] == ("work", i, len(items))
    assert heard == [("work", i, len(items)) for i in range(len(items) + 1)]


def test_a_stream_has_the_total_that_is_given_or_none():
    with listen(heard := Heard()):
        list(track(iter("ab"), "one"))
        list(track(iter("ab"), "two", total=2))
    assert [total for _, _, total in heard] == [None] * 3 + [2] * 3


def test_the_inner_listener_hears_and_then_the_outer_one_again():
    with listen(outer := Heard()):
        with listen(inner := Heard()):
            report("inner", 1)
        with listen(None):
            report("nobody", 1)
        report("outer", 1)
    assert ([w for w, _, _ in inner], [w for w, _, _ in outer]) == (["inner"], ["outer"])


def test_after_an_error_the_outer_listener_is_back():
    with listen(outer := Heard()):
        with pytest.raises(KeyError), listen(Heard()):
            raise KeyError
        report("outer", 1)
    assert len(outer) == 1


def test_what_a_listener_raises_stops_the_work():
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt), listen(stop):
        for item in track(range(5), "work"):
            done.append(item)
    assert done == [0, 1]
    report("work", 2)  # nobody listens any more


def test_threads_do_not_hear_each_other():
    heard, met = {n: Heard() for n in "ab"}, threading.Barrier(2)

    def work(name):
        with listen(heard[name]):
            met.wait()
            list(track(range(20), name))
            met.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in "ab"]
    with listen(mine := Heard()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert mine == []
    assert all({w for w, _, _ in heard[n]} == {n} and len(heard[n]) == 21 for n in "ab")


def test_the_time_left_goes_by_the_pace_of_this_work():
    pace = Pace()
    told = [pace.left_s("work", done, total, now) for now, done, total in ((0, 10, 20), (5, 15, 20), (10, 20, 20))]
    assert told == [None, 5.0, 0.0]  # resumed at 10
    assert pace.left_s("work", 0, 2, 100) is None  # the next of its name
    assert pace.left_s("work", 1, 2, 103) == 3.0
    assert pace.left_s("other", 5, None, 103) is None
