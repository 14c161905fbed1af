"""Errors form the drawn tree, carry the exit codes of the command line, and name what is near."""

from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch import errors

CLASSES = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, Exception)}


def drawn():
    """Read the tree of the module's docstring: name, parent, exit code where one is given."""
    path, rows = [], []
    for line in errors.__doc__.splitlines():
        if found := re.match(
            r"([│├└─ ]*)(\w+Error|UnknownName|WrongBase|StoreDown|BoundRefused|NoEffect)\b\s*(\d+)?", line
        ):
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            rows.append((found[2], path[-2] if depth else None, found[3]))
    return rows


@pytest.mark.parametrize(("name", "parent", "code"), drawn())
def test_the_drawn_tree_is_the_real_one(name, parent, code):
    assert CLASSES[name].__base__.__name__ == (parent or "Exception")
    if code:
        assert CLASSES[name].exit_code == int(code)


def test_every_error_is_drawn_and_exported():
    assert {name for name, _, _ in drawn()} == set(CLASSES)
    assert set(errors.__all__) == {*CLASSES, "absent", "unknown"}


@pytest.mark.parametrize("name", CLASSES)
def test_the_users_mistakes_exit_with_2_and_the_root_catches_all(name):
    error = CLASSES[name]("what")
    assert isinstance(error, errors.RetouchError)
    assert (error.exit_code == 2) == isinstance(error, errors.UserError)


def test_an_unknown_name_says_what_is_near_what_is_known_and_where_to_look():
    error = errors.unknown("edit method", "memitt", ["rome", "memit"], "retouch methods edit")
    assert isinstance(error, errors.UnknownName)
    assert str(error) == (
        "No edit method is called 'memitt'. Did you mean 'memit'? Known: memit, rome. See: retouch methods edit"
    )


def test_nothing_near_is_not_guessed_and_nothing_known_is_said():
    assert str(errors.unknown("verb", "xyz", ["edit"])) == "No verb is called 'xyz'. Known: edit."
    assert str(errors.unknown("verb", "xyz", [])) == "No verb is called 'xyz'. Known: none."


@given(st.text(), st.lists(st.text(), max_size=4))
def test_any_text_can_be_unknown(name, known):
    message = str(errors.unknown("method", name, known))
    assert repr(name) in message
    assert all(k in message for k in known)


def test_a_path_that_is_not_there_says_what_is_near(tmp_path):
    (tmp_path / "train.tsv").touch()
    assert str(errors.absent(tmp_path / "tran.tsv")).endswith("Did you mean 'train.tsv'?")
    assert str(errors.absent(tmp_path / "none" / "x")) == f"There is no file or folder '{tmp_path}/none/x'."
