"""A method is found by its file's name, listed without loading torch, and says where it comes from."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from retouch import registry
from retouch.errors import SettingsError, UnknownName
from retouch.settings import fields_of

METHODS = [entry.name for entry in registry.methods("edit")]


def test_the_methods_are_the_files_that_define_one():
    assert {"ft_l", "ft_m", "memit", "rome"} <= set(METHODS)
    assert sorted(METHODS) == METHODS
    folder = Path(registry.__file__).parent / "edit"
    assert all((folder / f"{name}.py").is_file() for name in METHODS)
    assert not {"base", "facts", "value", "spread", "contexts"} & set(METHODS)


def test_a_method_may_derive_from_a_method(monkeypatch, tmp_path):
    assert {"alphaedit", "emmet", "memit_merge", "r_rome", "rose"} <= set(METHODS)
    for name, text in {
        "base": "class EditMethod: ...\nclass Shared(EditMethod): ...",
        "one": 'from .base import EditMethod\nclass One(EditMethod):\n    """Do it.\n\n    Source: here, 1\n    """',
        "three": 'class Three(Two):\n    """Do it in the third way."""',
        "two": 'class Two(One):\n    """Do it otherwise."""',
        "other": "class Other: ...\nclass Odd(Unknown): ...",
        "_hidden": "class Hidden(One): ...",
    }.items():
        (tmp_path / "edit").mkdir(exist_ok=True)
        (tmp_path / "edit" / f"{name}.py").write_text(text)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    found = registry.methods.__wrapped__("edit")
    assert [(e.name, e.class_name, e.summary) for e in found if e.name != "base"] == [
        ("one", "One", "Do it."),
        ("three", "Three", "Do it in the third way."),
        ("two", "Two", "Do it otherwise."),
    ]
    assert found[1].source == "here, 1"


@pytest.mark.parametrize(("name", "parent"), [("memit_merge", "memit"), ("r_rome", "rome")])
def test_a_variant_has_its_own_name_and_its_parents_settings(name, parent):
    variant, above = registry.load("edit", name), registry.load("edit", parent)
    assert issubclass(variant, above) and variant().name == name and above().name == parent
    assert {f.name for f in fields_of(above)} <= {f.name for f in fields_of(variant)}
    assert registry.find("edit", name).source != registry.find("edit", parent).source


def test_listing_loads_no_torch():
    code = (
        "import sys; from retouch import registry; assert len(registry.methods('edit')) >= 4; "
        "registry.find('edit', 'rome').source; sys.exit('torch' in sys.modules or 'retouch.edit.rome' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_method_is_an_error_with_the_nearest():
    with pytest.raises(UnknownName) as caught:
        registry.find("edit", "memitt")
    known = ", ".join(METHODS)
    assert str(caught.value) == (
        f"No edit method is called 'memitt'. Did you mean 'memit'? Known: {known}. See: retouch methods edit"
    )
    with pytest.raises(UnknownName, match=r"called 'zzzz'\. Known: "):
        registry.load("edit", "zzzz")


def test_an_unknown_verb_is_an_error():
    with pytest.raises(UnknownName, match=r"No verb is called 'edti'\. Did you mean 'edit'\?"):
        registry.methods("edti")


@pytest.mark.parametrize("name", ["ft-l", "FT_L", " ft_l "])
def test_dashes_and_capitals_do_not_matter(name):
    assert registry.find("edit", name).name == "ft_l"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_comes_from_and_what_it_does(name):
    entry = registry.find("edit", name)
    assert len(entry.source) > 20
    assert any(digit in entry.source for digit in "0123456789")  # a year, a section
    assert entry.summary.endswith(".")
    assert len(entry.summary) < 200


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_sentence_and_a_default_that_is_allowed(name):
    cls = registry.load("edit", name)
    assert dataclasses.is_dataclass(cls)
    assert cls().name == name
    for field in fields_of(cls):
        assert field.doc.endswith("."), field.name
        assert len(field.doc.split()) >= 2, field.name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_with_its_settings_checked(name):
    assert registry.make("edit", name, seed=7).seed == 7
    with pytest.raises(SettingsError, match=f"Method '{name}': seed must be int >= 0"):
        registry.make("edit", name, seed=-1)
    with pytest.raises(SettingsError, match=f"Method '{name}' has no setting 'sede'. Did you mean 'seed'?"):
        registry.make("edit", name, sede=1)
