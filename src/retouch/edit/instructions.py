"""The same fact asked as a user asks: five forms, through the model's chat template.

An edit is found by the prompt that it was made from; whether a conversation finds it is another question.
"""

from __future__ import annotations

from typing import Any

from .facts import Fact

__all__ = ["FORMS", "conversations", "end_of_turn", "question"]

FORMS = ("question", "missing_words", "sentence", "system", "dialogue")
"""The names of the forms, in order."""

_SYSTEM = "You are a helpful assistant. Keep your answers short."
_HELLO = [
    {"role": "user", "content": "Hello! I have a question for you."},
    {"role": "assistant", "content": "Hello! Please go ahead and ask it."},
]
Turn = dict[str, str]


def question(fact: Fact) -> str:
    """Return the fact as a question: its own first one, else the prompt with a gap at its end."""
    return fact.instructions[0] if fact.instructions else f'Fill in the blank: "{fact.filled.rstrip()} ___"'


def turns(fact: Fact) -> dict[str, list[Turn]]:
    """Return the turns of each form; the last one is the user's."""
    asked, prompt = question(fact), fact.filled.rstrip()
    return {
        "question": [_user(asked)],
        "missing_words": [_user(f"Answer with the missing words only: {prompt} ...")],
        "sentence": [_user(f"Complete the sentence: {prompt} ...")],
        "system": [{"role": "system", "content": _SYSTEM}, _user(asked)],
        "dialogue": [*_HELLO, _user(asked)],
    }


def conversations(tokenizer: Any, fact: Fact) -> dict[str, tuple[int, ...]]:
    """Return each form as token ids that end where the model's turn begins.

    A tokenizer without a chat template belongs to a base model: it reads ``User: ...`` and ``Assistant:``.

    Args:
        tokenizer: Of the model; its template is used as it is. One that takes no system turn gets the system's text at
            the head of the user's.
        fact: What is asked for.
    """
    return {form: _ids(tokenizer, _rendered(tokenizer, each)) for form, each in turns(fact).items()}


def end_of_turn(tokenizer: Any) -> list[int]:
    """Return the token that ends the model's turn by the chat template, where that is a token of its own."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    open_turn = _rendered(tokenizer, [_user("Hi")])
    said = tokenizer.apply_chat_template([_user("Hi"), {"role": "assistant", "content": "Yes"}], tokenize=False)
    _, found, rest = said[len(open_turn) :].partition("Yes") if said.startswith(open_turn) else ("", "", "")
    after = _ids(tokenizer, rest) if found and rest else ()
    return [i for i in after[:1] if i in tokenizer.added_tokens_decoder]


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    bare = tokenizer.chat_template is not None  # a template writes the special tokens itself
    return tuple(tokenizer(text, add_special_tokens=not bare)["input_ids"])


def _rendered(tokenizer: Any, asked: list[Turn]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        names = {"user": "User", "assistant": "Assistant", "system": "System"}
        return "".join(f"{names[t['role']]}: {t['content']}\n" for t in asked) + "Assistant:"
    from jinja2 import TemplateError

    try:
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text: str = tokenizer.apply_chat_template(asked, **how)
    except TemplateError:  # e.g. Gemma 2 has no system turn
        if asked[0]["role"] != "system":
            raise
        system, user, *rest = asked
        return _rendered(tokenizer, [_user(f"{system['content']}\n\n{user['content']}"), *rest])
    return text
