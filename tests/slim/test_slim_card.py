"""The card says what was measured and proved, can be read by hubs, and takes what users wrote literally."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from slim_made import made

from retouch.slim.card import card, sentences
from retouch.store import read_json


@pytest.fixture(scope="module")
def slim():
    return made(flops="1/3", max_harm=0.5)


@pytest.fixture(scope="module")
def text(slim):
    return card(slim, "retouch slim tiny/bert --train 'train.tsv'")


def header(text):
    return yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])


def test_the_header_is_what_hubs_read(slim, text):
    read = header(text)
    assert (read["library_name"], read["pipeline_tag"]) == ("transformers", "text-classification")
    assert read["base_model"] == "tiny/bert"
    assert "early-exit" in read["tags"]
    result = read["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == round(slim.point.quality, 4)
    assert result["dataset"]["split"] == "test"


def test_a_folder_is_no_base_model_of_a_hub(slim, tmp_path):
    assert "base_model" not in header(card(replace(slim, record={**slim.record, "source": str(tmp_path)})))


def test_sizes_quality_and_exits_are_told(slim, text):
    n = sum(p.numel() for p in slim.classifier.network.parameters())
    assert f"| {n:,} |" in text
    assert f"| FLOPs a text, measured mean | 1 | {slim.point.flops_ratio:.4f} |" in text
    assert f"| FLOPs, every text 128 tokens | 1 | {slim.flops_ratio_128:.4f} |" in text
    assert f"| original | {slim.quality_base:.4g} |" in text
    assert f"| slim, leaving early | {slim.point.quality:.4g} | {slim.point.quality_kept:.1%} |" in text
    for block, share in slim.point.leaves.items():
        assert f"| block {block} | {share:.1%} |" in text
    assert "Measured on test rows, which chose nothing" in text


def test_threshold_certificate_command_and_the_way_to_open_it_are_told(slim, text):
    plain = text.replace("\\", "")
    assert slim.threshold.certificate.sentence() in plain
    assert f"below {slim.threshold.value:.6g}" in plain
    assert "```sh\nretouch slim tiny/bert --train 'train.tsv'\n```" in text
    assert "import retouch.slim" in text
    assert "## Limits" in text


def test_a_certificate_that_fails_is_told_of_a_refusal_alone(slim):
    proof = replace(slim.threshold.certificate, limit=0.001, upper=0.02)
    careful = replace(slim.threshold, value=0.0, certificate=proof, reason="No saving is certified.")
    assert careful.sentences() == ["No saving is certified."]
    refused = replace(careful, value=None, reachable=False, reason=f"It is above. {proof.sentence()}")
    assert refused.sentences() == [f"It is above. {proof.sentence()}"]
    assert "above the limit" not in "".join(sentences(replace(slim, threshold=careful)))
    assert slim.threshold.sentences()[0] == slim.threshold.certificate.sentence()


def test_of_a_quality_not_above_0_no_share_is_told(slim):
    read = card(replace(slim, quality_base=-0.05, point=replace(slim.point, quality_kept=0.0)))
    assert "| slim, all blocks |" in read
    assert not [line for line in read.split("## Exits")[0].splitlines() if line.startswith("| slim") and "%" in line]
    assert "% of it" not in read


def test_the_card_of_a_model_of_pairs_shows_pairs(slim):
    assert "text_pair" not in card(slim)
    read = card(replace(slim, classifier=replace(slim.classifier, pairs=True)))
    assert '[{"text": "a text", "text_pair": "another one"}]' in read
    assert 'printf "a text\\tanother one\\n" | retouch slim' in read


def test_what_does_not_hold_is_said(slim):
    refused = replace(slim.threshold, value=None, reachable=False, reason="It costs too much.", certificate=None)
    said = sentences(replace(slim, threshold=refused))
    assert said[0] == "What was asked does not hold, so the saved threshold is 0: nobody leaves early."
    assert "No limit of harm was asked for, so no harm is certified." in said
    assert "It costs too much." in said
    assert "nobody leaves early" in sentences(replace(slim, threshold=None))[0]
    assert "nobody leaves early" in sentences(replace(slim, threshold=replace(slim.threshold, value=0.0)))[0]


def test_rows_that_chose_something_are_no_measurement(slim):
    assert "flatters" in card(replace(slim, measured_on="calib"))
    assert "flatters" not in card(slim)


def test_names_and_commands_are_taken_literally(slim):
    names = {**slim.record, "source": "a/b\n---\n# <b>", "task": {**slim.record["task"], "name": '"]: <script>'}}
    text = card(replace(slim, record=names), "x ``` `y`")
    assert header(text)["model-index"][0]["results"][0]["dataset"]["name"] == '"]: <script>'
    assert "<script>" not in text.split("\n---\n", 1)[1].replace("\\<", "")
    assert "````sh\nx ``` `y`\n````" in text


def test_it_lies_in_the_saved_folder(slim, tmp_path):
    slim.save(tmp_path / "out", keep_refused=True, command="retouch slim x")
    assert (tmp_path / "out" / "README.md").read_text() == card(slim, "retouch slim x")
    assert read_json(tmp_path / "out" / "retouch.json")["quality"] == slim.point.quality
