"""Positions are those that a walk over the text, byte by byte, finds; padding moves nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import families
from retouch.errors import FactError, ModelError
from retouch.tokens import Row, Text, encode, pad

EMOJI = "👩‍🚀"
words = functools.cache(families.tokenizer)


# The oracle knows no offsets: it spells every token out in bytes and walks along the text.


@functools.cache
def _byte_of() -> dict[str, int]:
    """Undo GPT-2's alphabet: printable bytes stand for themselves, the others follow from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in plain)}
    assert set(alphabet) == set(ByteLevel.alphabet())
    return alphabet


def spelled(kind: str, token: str) -> bytes:
    if kind == "byte":
        return bytes(_byte_of()[c] for c in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def owners(kind: str, tokenizer: Any, ids: tuple[int, ...], text: str) -> list[list[int]]:
    """For each character of the text, the tokens that hold a byte of it."""
    owner, spelling = [], b""
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        if ids[index] not in tokenizer.all_special_ids:
            piece = spelled(kind, token)
            spelling += piece
            owner += [index] * len(piece)
    if spelling == b" " + text.encode():  # the bar that some tokenizers put before the first word
        spelling, owner = spelling[1:], owner[1:]
    assert spelling == text.encode()
    result, at = [], 0
    for character in text:
        n = len(character.encode())
        result.append(owner[at : at + n])
        at += n
    return result


def slow_row(kind: str, tokenizer: Any, text: Text, ids: tuple[int, ...]) -> Row:
    prompt = (text.context + text.before + text.subject + text.after).rstrip()
    target = text.target if not text.target or text.target[0].isspace() else " " + text.target
    owner = owners(kind, tokenizer, ids, prompt + target)
    subject, merged, last = None, False, len(ids) - 1
    if text.subject:
        end = len(text.context + text.before + text.subject)
        subject = owner[end - 1][-1]
        merged = any(subject in later for later in owner[end:]) and end < len(prompt)
    if text.target:
        first = next(i for i in range(len(prompt), len(owner)) if not (prompt + target)[i].isspace())
        begin = owner[first][0]
        merged = merged or any(begin in earlier for earlier in owner[: len(prompt)])
        last = begin - 1
    return Row(ids, subject, last, merged)


PIECES = [
    "The",
    " capital of ",
    " is ",
    "s",
    "é",
    "Zürich",
    EMOJI,
    " ",
    ", ",
    "日本",
    "in the ",
    "e\u0301",
    "\n",
    "{}",
    ".",
]
NAMES = ["France", "Eiffel Tower", "São Paulo", EMOJI, "Đorđe", "X", "e\u0301", "𝔘", "東京タワー"]
pieces = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
free = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>|", exclude_categories=["Cc", "Cs"]))
subjects = st.one_of(st.sampled_from(NAMES), free.map(str.strip).filter(bool))
targets = st.sampled_from(["", "Paris", " Paris", "the city of São Paulo", EMOJI, "\nyes", "日本"])


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@settings(max_examples=150, deadline=None)
@given(context=pieces, before=pieces, subject=subjects, after=pieces, target=targets)
def test_positions_are_those_of_a_walk_over_the_text(kind, context, before, subject, after, target):
    text = Text(before, subject, after, target, context)
    (row,) = encode(words(kind), [text])
    assert row == slow_row(kind, words(kind), text, row.ids)


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@settings(max_examples=50, deadline=None)
@given(context=pieces, before=pieces, target=targets)
def test_a_prompt_without_a_subject_has_only_an_end(kind, context, before, target):
    text = Text(before, target=target, context=context)
    assume((context + before).strip())
    (row,) = encode(words(kind), [text])
    assert row.subject is None
    assert row == slow_row(kind, words(kind), text, row.ids)


def decoded(kind: str, ids: Any) -> str:
    return words(kind).decode(list(ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", " is the capital of"),
        ("In ", " one finds"),
        ("The tower is in ", ""),
        ("Paris is not Paris, so ", ", Paris is"),
    ],
    ids=["start", "middle", "end", "twice"],
)
def test_the_subject_and_the_prompt_end_where_their_text_ends(kind, before, after):
    (row,) = encode(words(kind), [Text(before, "Paris", after, "the city")])
    assert decoded(kind, row.ids[: row.subject + 1]).removeprefix("<s>").strip() == f"{before}Paris".strip()
    assert decoded(kind, row.ids[: row.prompt + 1]).removeprefix("<s>").strip() == f"{before}Paris{after}".strip()
    assert decoded(kind, row.target).strip() == "the city"
    assert not row.merged
    assert (row.subject == row.prompt) == (after == "")


def test_a_target_of_many_tokens_is_whole_and_what_is_seen_lacks_its_last():
    (row,) = encode(words("byte"), [Text("I live in ", "Rome", ", near the", "Capitoline Hill")])
    assert len(row.target) > 2
    assert row.ids == (*row.ids[: row.prompt + 1], *row.target)
    assert row.seen == row.ids[:-1]
    (bare,) = encode(words("byte"), [Text("I live in ", "Rome")])
    assert bare.target == ()
    assert bare.seen == bare.ids


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_a_space_that_is_a_token_of_its_own_counts_to_the_prompt(kind):
    (row,) = encode(words(kind), [Text("", "Paris", " is", EMOJI)])
    assert words(kind).convert_ids_to_tokens(row.ids[row.prompt]) in ("Ġ", "▁")
    assert decoded(kind, row.target) == EMOJI


def test_one_leading_space_goes_before_a_target_and_none_stays_at_a_prompts_end():
    texts = [
        Text("It is ", "Rome", after, target) for after in (" in", " in  ", " in\n") for target in ("Italy", " Italy")
    ]
    assert len(set(encode(words("byte"), texts))) == 1


def test_rows_are_the_same_alone_and_together():
    texts = [
        Text("", "Rome", " is in", "Italy"),
        Text("See ", "São Paulo", "", "Brazil"),
        Text("", EMOJI, "s are", "x"),
    ]
    for kind in ("byte", "metaspace"):
        assert encode(words(kind), texts) == [encode(words(kind), [t])[0] for t in texts]


def test_no_texts_are_no_rows():
    assert encode(words("byte"), []) == []


def glued(*extra: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits nowhere: letters, and the merges that lead to `extra`."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁."})
    merges, known = [], dict.fromkeys(letters)
    for token in extra:
        for n in range(1, len(token)):
            if token[: n + 1] not in known:
                merges.append((token[:n], token[n]))
                known[token[: n + 1]] = None
    model = models.BPE(vocab={t: i for i, t in enumerate(known)}, merges=merges)
    own = tokenizers.Tokenizer(model)
    own.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=own)


def test_a_token_over_the_subjects_end_is_kept_and_reported():
    tokenizer = glued("eX")
    (row,) = encode(tokenizer, [Text("in ", "Rome", "X now", "so")])
    assert row.merged
    assert tokenizer.convert_ids_to_tokens(row.ids[row.subject]) == "eX"
    (clean,) = encode(tokenizer, [Text("in ", "Rome", " now", "so")])
    assert not clean.merged


def test_a_token_over_the_prompts_end_is_kept_and_reported():
    tokenizer = glued("n▁P")
    (row,) = encode(tokenizer, [Text("he is ", "Bob", " in", "Pa")])
    assert row.merged
    assert tokenizer.convert_ids_to_tokens(list(row.target)) == ["n▁P", "a"]
    assert tokenizer.convert_ids_to_tokens(row.ids[row.prompt]) == "i"
    (clean,) = encode(tokenizer, [Text("he is ", "Bob", " in", "Ra")])
    assert not clean.merged


def test_a_subject_at_the_very_end_is_not_merged_by_the_target_it_precedes():
    (row,) = encode(glued("e▁P"), [Text("in ", "Rome", "", "Pa")])
    assert row.merged  # the prompt's end, which is the subject's too
    assert row.subject == row.prompt + 1


@pytest.mark.parametrize("bos", ["tokenizer", "always", "never"])
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_beginning_of_text_follows_its_rule(kind, bos):
    tokenizer = families.tokenizer(kind)
    if kind == "byte":  # it has a token but does not add it, like GPT-2's
        tokenizer.bos_token = "<|end|>"
    text = Text("", "Rome", " is in", "Italy")
    (bare,) = encode(tokenizer, [text], bos="never")
    (row,) = encode(tokenizer, [text], bos=bos)
    n = int(bos == "always" or (bos == "tokenizer" and kind == "metaspace"))
    assert row.ids == (tokenizer.bos_token_id,) * n + bare.ids
    assert (row.subject, row.prompt) == (bare.subject + n, bare.prompt + n)
    assert bare.ids[0] != tokenizer.bos_token_id


def test_always_needs_a_token_to_put_there():
    with pytest.raises(ModelError, match="no beginning-of-text token"):
        encode(words("byte"), [Text("x", target="y")], bos="always")


def test_an_end_of_text_token_never_stands_between_prompt_and_target():
    tokenizer = words("word")
    (row,) = encode(tokenizer, [Text("The mayor of ", "Zürich", " is")])
    assert row.ids[0] == tokenizer.cls_token_id
    assert tokenizer.sep_token_id not in row.ids
    assert tokenizer.decode(row.ids[1 : row.subject + 1]) == "the mayor of zurich"


def test_a_character_that_the_tokenizer_drops_stands_with_the_one_before_it():
    tokenizer = words("word")
    (row,) = encode(tokenizer, [Text("see ", "Rome\u200d", " now")])
    (plain,) = encode(tokenizer, [Text("see ", "Rome", " now")])
    assert (row.ids, row.subject) == (plain.ids, plain.subject)


def test_without_offsets_there_are_no_positions():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast tokenizer"):
        encode(Slow(), [Text("x")])


def test_a_text_without_tokens_and_a_prompt_without_tokens_are_errors():
    with pytest.raises(FactError, match="no tokens"):
        encode(words("byte"), [Text("")])
    with pytest.raises(FactError, match="no token before its target"):
        encode(words("byte"), [Text("", target="Rome")])


# Padding.

rows = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=7).map(tuple), min_size=1, max_size=5)


def check_rows(batch, given_rows):
    assert batch.shape == tuple(batch.mask.shape) == tuple(batch.positions.shape)
    for i, row in enumerate(given_rows):
        start = int(batch.first[i])
        columns = batch.mask[i].nonzero().flatten().tolist()
        assert columns == list(range(start, start + len(row)))
        assert batch.ids[i, columns].tolist() == list(row)
        assert batch.positions[i, columns].tolist() == list(range(len(row)))
        assert set(batch.ids[i, batch.mask[i] == 0].tolist()) <= {0}


@given(rows=rows, side=st.sampled_from(["left", "right"]))
def test_padding_shifts_no_token_and_no_position(rows, side):
    batch = pad(rows, 0, side=side)
    check_rows(batch, rows)
    longest = max(map(len, rows))
    assert batch.shape == (len(rows), longest)
    assert batch.first.tolist() == [longest - len(r) if side == "left" else 0 for r in rows]


@given(rows=rows, spare=st.integers(0, 2), data=st.data())
def test_anchors_share_one_column(rows, spare, data):
    anchors = [data.draw(st.integers(0, len(r) - 1)) for r in rows]
    batch = pad(rows, 0, anchors=anchors, spare=spare)
    check_rows(batch, rows)
    column = spare + max(anchors)
    assert (batch.first + torch.tensor(anchors)).tolist() == [column] * len(rows)
    assert [int(batch.ids[i, column]) for i in range(len(rows))] == [r[a] for r, a in zip(rows, anchors)]
    assert int(batch.mask[:, :spare].sum()) == 0
    assert bool(batch.mask[:, -1].any())
