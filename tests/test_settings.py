"""From a field's one declaration come its check, its error and its flag."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.errors import SettingsError
from retouch.settings import Settings, fields_of, from_flags, setting, with_settings


@dataclasses.dataclass(frozen=True)
class Brush(Settings):
    """A method with one setting of each type."""

    n_strokes: int = setting(3, "How often it strokes.", ge=1, le=10)
    learning_rate: float = setting(0.5, "Step size.", gt=0, lt=1)
    faithful: bool = setting(False, "As published.")
    metric: Literal["identity", "covariance"] = setting("identity", "What is small.")
    blocks: tuple[int, ...] = setting((), "Which blocks.")
    text: str = setting("", "A text file.")
    block: int = setting(-1, "Which block; -1 chooses.", ge=-1)


@dataclasses.dataclass(frozen=True)
class Broad(Brush):
    """A subclass adds a field and has the others."""

    width: float = setting(1.0, "Width in millimetres.", ge=0)


@dataclasses.dataclass(frozen=True)
class Either(Settings):
    """Settings of more than one type."""

    blocks: int | tuple[int, ...] = setting(-1, "One block or several.")
    contexts: Literal["plain", "memit"] | tuple[str, ...] = setting("memit", "A kind, or texts of your own.")
    limit: Optional[float] = setting(None, "A limit, if any.")  # noqa: UP045
    names: Union[str, list[str]] = setting("", "A name or several.")  # noqa: UP007


WRONG = [
    ("n_strokes", 0), ("n_strokes", 11), ("n_strokes", 2.5), ("n_strokes", "many"), ("n_strokes", None),
    ("n_strokes", True), ("learning_rate", 0.0), ("learning_rate", 1.0), ("learning_rate", math.nan),
    ("learning_rate", math.inf), ("learning_rate", False), ("learning_rate", [0.5]), ("faithful", 1),
    ("faithful", "true"), ("metric", "euclid"), ("metric", 3), ("blocks", 3), ("blocks", ("x",)), ("blocks", (1.5,)),
    ("text", 5), ("text", None), ("block", -2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_value_is_an_error_that_names_field_and_value(name, value):
    with pytest.raises(SettingsError) as caught:
        Brush(**{name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert message.startswith("Brush: ")
    with pytest.raises(SettingsError):
        dataclasses.replace(Brush(), **{name: value})


def test_the_error_says_what_is_allowed_and_what_the_field_is():
    with pytest.raises(
        SettingsError, match=r"must be int >= 1 and <= 10; got 0\. How often it strokes\. \(default 3\)"
    ):
        Brush(n_strokes=0)
    with pytest.raises(SettingsError, match=r"must be identity\|covariance; got 'euclid'"):
        Brush(metric="euclid")


@given(n=st.integers(), rate=st.floats(), block=st.integers())
def test_exactly_what_lies_within_the_bounds_is_taken(n, rate, block):
    allowed = 1 <= n <= 10 and 0 < rate < 1 and block >= -1
    try:
        made = Brush(n_strokes=n, learning_rate=rate, block=block)
    except SettingsError:
        assert not allowed
    else:
        assert allowed
        assert (made.n_strokes, made.learning_rate, made.block) == (n, rate, block)


def test_values_become_the_fields_type():
    made = Brush(blocks=[3, 4], learning_rate=0.25, n_strokes=2.0)
    assert made.blocks == (3, 4)
    assert type(made.n_strokes) is int
    assert type(Broad(width=2).width) is float
    assert hash(made) == hash(Brush(blocks=(3, 4), learning_rate=0.25, n_strokes=2))


def test_a_subclass_checks_its_own_fields_and_those_above():
    assert Broad(n_strokes=4, width=3.0).n_strokes == 4
    for wrong in ({"width": -1.0}, {"n_strokes": 0}):
        with pytest.raises(SettingsError, match="Broad: "):
            Broad(**wrong)


def test_an_unknown_setting_is_an_error_with_the_nearest():
    with pytest.raises(SettingsError, match=r"Brush has no setting 'learnin_rate'\. Did you mean 'learning_rate'\?"):
        with_settings(Brush, {"learnin_rate": 0.5})
    with pytest.raises(SettingsError, match=r"no setting 'xyz'\. Known: n_strokes, learning_rate, "):
        with_settings(Brush, {"xyz": 1})
    assert with_settings(Brush, {"n_strokes": 5}) == Brush(n_strokes=5)


def test_fields_are_listed_as_a_person_reads_them():
    rows = {f.name: f for f in fields_of(Broad)}
    assert list(rows)[-1] == "width"
    assert [f.name for f in fields_of(Brush)] == [f.name for f in dataclasses.fields(Brush)]
    assert (rows["n_strokes"].type, rows["n_strokes"].default, rows["n_strokes"].allowed) == (
        "int",
        3,
        ">= 1 and <= 10",
    )
    assert rows["metric"].type == "identity|covariance"
    assert rows["learning_rate"].allowed == "> 0 and < 1"
    assert rows["text"].doc == "A text file."


def test_a_dict_of_settings_is_json_and_makes_them_again():
    made = Brush(blocks=(1, 2), text="a.txt", learning_rate=0.125)
    again = with_settings(Brush, json.loads(json.dumps(made.to_dict())))
    assert again == made


def test_types_are_written_as_a_person_writes_them():
    assert [f.type for f in fields_of(Either)] == [
        "int | tuple[int, ...]", "plain|memit | tuple[str, ...]", "float | None", "str | list[str]",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match=r"contexts must be plain\|memit \| tuple\[str, \.\.\.\]; got 'rome'"):
        Either(contexts="rome")


# Flags.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--n-strokes 4", {"n_strokes": 4}),
        ("--n_strokes=4", {"n_strokes": 4}),
        ("--learning-rate 5e-4", {"learning_rate": 5e-4}),
        ("--learning-rate 0.5 --n-strokes 2", {"learning_rate": 0.5, "n_strokes": 2}),
        ("--faithful", {"faithful": True}),
        ("--faithful --n-strokes 4", {"faithful": True, "n_strokes": 4}),
        ("--faithful true", {"faithful": True}),
        ("--faithful false", {"faithful": False}),
        ("--faithful=no --n-strokes 4", {"faithful": False, "n_strokes": 4}),
        ("--blocks 3,4,5", {"blocks": (3, 4, 5)}),
        ("--blocks [3,4]", {"blocks": (3, 4)}),
        ("--blocks 3", {"blocks": (3,)}),
        ("--blocks=", {"blocks": ()}),
        ("--block -1", {"block": -1}),
        ("--metric covariance", {"metric": "covariance"}),
        ("--text a,b.txt", {"text": "a,b.txt"}),
        ("--text 2024", {"text": "2024"}),
        ("--text= --faithful", {"text": "", "faithful": True}),
        ("--n-strokes 4 --n-strokes 5", {"n_strokes": 5}),
    ],
)
def test_flags_make_settings(words, expected):
    assert from_flags(Brush, words.split()) == Brush(**expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--blocks 3", {"blocks": 3}),
        ("--blocks 3,4", {"blocks": (3, 4)}),
        ("--blocks [3]", {"blocks": (3,)}),
        ("--contexts plain", {"contexts": "plain"}),
        ("--contexts one,two", {"contexts": ("one", "two")}),
        ("--contexts [one]", {"contexts": ("one",)}),
        ("--limit 0.5", {"limit": 0.5}),
        ("--limit null", {"limit": None}),
        ("--names 2024", {"names": "2024"}),
    ],
)
def test_flags_of_settings_of_more_than_one_type(words, expected):
    assert from_flags(Either, words.split()) == Either(**expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("4", "'4' is not a flag"),
        ("-n 4", "'-n' is not a flag"),
        ("--n-strokes", "--n-strokes needs a value"),
        ("--n-strokes --faithful", "--n-strokes needs a value"),
        ("--n-stroke 4", "Did you mean 'n_strokes'?"),
        ("--faithfull", "Did you mean 'faithful'?"),
        ("--faithfull --n-strokes 4", "Did you mean 'faithful'?"),
        ("--faithful maybe", "faithful must be true or false; got 'maybe'"),
        ("--faithful 1", "faithful must be true or false; got 1"),
        ("--n-strokes many", "n_strokes must be int >= 1 and <= 10; got 'many'"),
        ("--n-strokes true", "n_strokes must be int"),
        ("--n-strokes 4,5", "n_strokes must be int"),
        ("--blocks a,b", "blocks must be tuple[int, ...]"),
        ("--learning-rate [", "learning_rate must be float"),
        ("--metric euclid", "identity|covariance"),
    ],
)
def test_wrong_flags_say_what_is_wrong(words, message):
    with pytest.raises(SettingsError) as caught:
        from_flags(Brush, words.split())
    assert message in str(caught.value)


@given(n=st.integers(1, 10), rate=st.floats(1e-6, 0.99), blocks=st.lists(st.integers(0, 99)), faithful=st.booleans())
def test_settings_written_as_flags_come_back(n, rate, blocks, faithful):
    made = Brush(n_strokes=n, learning_rate=rate, blocks=tuple(blocks), faithful=faithful)
    words = [
        word for k, v in made.to_dict().items() for word in (f"--{k.replace('_', '-')}", _written(v)) if k != "text"
    ]
    assert from_flags(Brush, words) == made


def _written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def test_a_form_has_the_choices_and_the_default_as_a_flag_takes_it():
    fields = {f.name: f for f in [*fields_of(Broad), *fields_of(Either)]}
    assert fields["metric"].choices == ("identity", "covariance")
    assert all(not f.choices for name, f in fields.items() if name != "metric")
    assert [fields[n].written for n in ("n_strokes", "faithful", "limit", "width")] == ["3", "false", "", "1.0"]
    for made in (Broad(), Either()):
        assert from_flags(type(made), [f"--{f.name}={f.written}" for f in fields_of(type(made)) if f.written]) == made


def test_a_list_is_written_as_a_flag_takes_it():
    field = dataclasses.replace(fields_of(Brush)[4], default=(3, 4))
    assert from_flags(Brush, [f"--blocks={field.written}"]).blocks == (3, 4)
