"""Looks at held-out examples: counted once each, for every set, and paid for."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from retouch import attempts, store
from retouch.errors import StoreError, UserError


def test_the_same_look_again_keeps_its_number():
    assert [attempts.count(look, "users") for look in ("a", "b", "a", "c")] == [1, 2, 1, 3]
    assert attempts.count("a", "other users") == 1


def test_every_set_has_its_own_count_and_the_highest_counts():
    assert [attempts.count(look, "news") for look in ("a", "b")] == [1, 2]
    assert attempts.count("c", "news", "law") == 3, "beside a set that is looked at for the first time"
    assert attempts.count("d", "law") == 2


def test_looks_at_one_time_each_get_their_own_number():
    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(lambda i: attempts.count(str(i), "users"), range(16)))
    assert found == list(range(1, 17))


def test_all_attempts_together_spend_no_more_than_was_said():
    spent = [attempts.share(0.05, k) for k in range(1, 2000)]
    assert spent[0] == 0.025 and spent == sorted(spent, reverse=True)
    assert 0.0499 < sum(spent) <= 0.05
    with pytest.raises(UserError, match="Attempts count from 1"):
        attempts.share(0.05, 0)


@pytest.mark.parametrize("text", ["{}", "[]", '{"looks": []}', '{"looks": [1]}', "{"])
def test_a_count_that_cannot_be_read_is_refused_and_kept(text):
    attempts.count("a", "users")
    (place,) = (store.cache_dir() / "attempts").glob("*/looks.json")
    place.write_text(text)
    with pytest.raises(StoreError, match=r"no count of attempts|not valid JSON"):
        attempts.count("a", "users")
    assert place.read_text() == text
