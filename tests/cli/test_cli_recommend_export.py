"""``retouch bench recommend --export``: files for RecBole and nothing else, from the flags that a bench would use."""

import sys

import pytest

import toy_shop

# Typer asks click 8.5 by old names; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")


def ended(monkeypatch, *words):
    """Run a command in this process, and return its exit code."""
    from retouch.cli import main

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["retouch", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_the_split_is_written_and_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_shop.csv_file(tmp_path / "toy.csv")
    words = ("bench", "recommend", "--data", "toy.csv", "--holdout", "targets", "--export", "out")
    assert ended(monkeypatch, *words) == 0
    assert "Saved as out: the split of 130 users for RecBole." in capsys.readouterr().out
    users = {
        part: {row.split("\t")[0] for row in (tmp_path / "out" / f"out.{part}.inter").read_text().splitlines()[1:]}
        for part in ("train", "valid", "test", "plain")
    }
    assert users["test"] == users["train"] == users["plain"] and len(users["test"]) == 130
    assert users["valid"] < users["test"], "the certificate's users validate nothing"
    assert not (tmp_path / "bench-recommend.json").exists()


def test_a_folder_of_somebody_else_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_shop.csv_file(tmp_path / "toy.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    assert ended(monkeypatch, "bench", "recommend", "--data", "toy.csv", "--export", "out") == 2
    assert "will not be replaced" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
