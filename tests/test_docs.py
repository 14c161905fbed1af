"""The documentation is held to the truth: generated pages, links, programs in pages, the examples, CONTRIBUTING."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import families
import retouch.edit
from retouch import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), ROOT / "src/retouch/data/README.md"])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """The fenced blocks of a page: what stands after the fence, and the code."""
    return [(words.strip(), code) for _, words, code in FENCE.findall(path.read_text(encoding="utf-8"))]


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny decoder as a folder; this one's answers yield to every edit of the pages."""
    folder = tmp_path_factory.mktemp("decoder") / "tiny"
    families.build("gpt2", 4, seed=2).save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder as a folder."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    families.build("bert", 4, headless=True).save_pretrained(folder)
    families.tokenizer("word").save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def build():
    with warnings.catch_warnings():  # some pairs of Typer and Click warn of each other when they are imported
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("typer")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(build):
    stale = [name(path) for path, text in build.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: make docs"


def test_generated_pages_hold_every_method_and_every_described_parameter(build):
    page, index = build.methods(), (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for verb in registry.BASES:
        for entry in registry.methods(verb):
            assert f"### {entry.name}\n\n{entry.summary}" in page
            assert re.search(rf"\[[^\]]*\b{entry.name}\b[^\]]*\]\(methods/", index), f"{entry.name} has no page"
    commands = build.commands()
    for command in ("bench edit", "bench slim", "slim"):
        assert f"## retouch {command}\n" in commands
    assert "A saved change." in commands, "arguments have their help, too"


def test_build_checks_without_writing(build, tmp_path, monkeypatch, capsys):
    for page in ("bounds.md", "slim.md"):
        shutil.copy(ROOT / "docs" / page, tmp_path)
    monkeypatch.setattr(build, "DOCS", tmp_path)
    assert build.main(check=True) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bounds.md", "slim.md"]
    assert build.main(check=False) == 0
    assert build.main(check=True) == 0
    assert "commands.md is out of date" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_inside_the_repository_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=name)
def test_programs_in_pages_run(page, decoder, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models, space = {'"smollm2"': decoder, '"minilm"': encoder}, {}
    for words, code in blocks(page):
        if not words.startswith("python"):
            continue
        assert words in ("python run", "python no-run"), f"{name(page)}: say run or no-run, not {words!r}"
        for shown, folder in models.items():
            code = code.replace(shown, repr(str(folder)))
        program = compile(code, name(page), "exec")
        if words == "python run":
            exec(program, space)


# ---------------------------------------------------------------- examples


def run_example(path, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("edit_one_fact", "saved as lyon"),
        ("edit_your_facts", "efficacy: 1.00"),
        ("undo", "all undone, every bit as before: True"),
        ("export_lora", "read back, same weights: True"),
    ],
)
def test_examples_run(example, said, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example(ROOT / "examples" / f"{example}.py", monkeypatch, "--model", decoder)
    assert said in capsys.readouterr().out


def test_the_notebook_of_own_facts_runs(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = ROOT / "examples" / "edit_your_own_facts.py"
    run_example(notebook, monkeypatch, "--model", decoder, "--out", "own", "-f", "an argument of the kernel")
    said = capsys.readouterr().out
    for text in (
        "a mistake reads like this: field 'target' is empty.",
        "Big Ben -> Tokyo: -log P",
        "With 95% confidence the mean of changed answers is at most",
        "still edited: ['France', 'France', 'Orbital Harbour']",
        "after 2 edits: efficacy",
        "read back, same weights: True",
    ):
        assert text in said
    own = tmp_path / "own"
    page = (own / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert "Big Ben is located in the city of" in page
    base, ledger = retouch.open_ledger(str(decoder)), retouch.open_ledger(str(own / "model"))
    assert [len(change.facts) for change in ledger.active] == [3]
    assert ledger.undo(1).model.fingerprint == base.model.fingerprint
    whole = retouch.apply(base.model, retouch.load_change(own / "change"))
    adapter = retouch.from_peft(own / "adapter", base.model)
    assert retouch.apply(base.model, adapter).fingerprint == whole.fingerprint


def test_the_notebook_is_made_of_cells():
    text = (ROOT / "examples" / "edit_your_own_facts.py").read_text(encoding="utf-8")
    _, *cells = re.split(r"^# %%", text, flags=re.M)
    assert len(cells) > 15
    for cell in cells:
        head, _, body = cell.partition("\n")
        assert head in ("", " [markdown]")
        lines = [line for line in body.splitlines() if line.strip()]
        assert lines
        assert all(line.startswith("#") for line in lines) is bool(head), (
            f"text in a cell of code, or code in text: {cell}"
        )


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_are_short_and_tested(path):
    text = path.read_text(encoding="utf-8")
    assert f'"{path.stem}' in Path(__file__).read_text(encoding="utf-8")
    if "# %%" in text:  # a notebook: its cells are short, and it has no main function
        return
    assert len(text.splitlines()) < 40
    assert 'if __name__ == "__main__":' in text


# ---------------------------------------------------------------- CONTRIBUTING


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The method of CONTRIBUTING as a file that the registry finds, and its test beside it."""
    files = {words.partition("file=")[2]: code for words, code in blocks(ROOT / "CONTRIBUTING.md") if "file=" in words}
    folder = tmp_path / "edit"
    folder.mkdir()
    for file, code in files.items():
        (folder / file).write_text(code, encoding="utf-8")
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    monkeypatch.setattr(retouch.edit, "__path__", [*retouch.edit.__path__, str(folder)])
    registry.methods.cache_clear()
    yield folder
    registry.methods.cache_clear()
    sys.modules.pop("retouch.edit.least_norm", None)
    vars(retouch.edit).pop("least_norm", None)


def test_the_method_of_contributing_is_found_by_its_file(added):
    (entry,) = registry.methods("edit")
    assert entry.name == "least_norm"
    assert entry.source.startswith("the least-norm solution")
    assert registry.make("edit", "least-norm", block=1).name == "least_norm"


def test_the_test_of_contributing_passes(added, tiny):
    space = runpy.run_path(str(added / "test_least_norm.py"))
    tests = [value for key, value in space.items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test(tiny)


def test_the_method_of_contributing_edits(added, decoder):
    from retouch import Fact, edit_facts, open_model

    facts = [Fact("The capital of {} is", "France", "Lyon")]
    (effect,) = edit_facts(open_model(decoder), facts, "least_norm").effect
    assert effect["nll_after"] < effect["nll_before"]


def test_the_method_of_contributing_keeps_the_style(added):
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    source = added / "least_norm.py"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
