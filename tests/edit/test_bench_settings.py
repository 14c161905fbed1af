"""A list of methods names their settings too, those of several parts with ``+`` between them."""

from __future__ import annotations

import pytest

from retouch import registry
from retouch.errors import SettingsError, UserError


def test_a_setting_of_several_parts_is_joined_by_plus_signs():
    found = registry.parse("edit", "memit:blocks=3+4+5:metric=identity,top:blocks=7,rome:learning-rate=1e+1")
    assert list(found) == ["memit:blocks=3+4+5:metric=identity", "top:blocks=7", "rome:learning-rate=1e+1"]
    memit, top, rome = found.values()
    assert (memit.blocks, memit.metric) == ((3, 4, 5), "identity")
    assert top.blocks == (7,)
    assert rome.learning_rate == 10.0  # a number's own sign stays


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("memit:blocks=3,4,5", UserError, r"'4' is no method\. .* write \+ between them: blocks=3\+4\+5"),
        ("memit:blocks=3+x", SettingsError, r"blocks must be tuple\[int, \.\.\.\]"),
        ("rome:block=3+4", SettingsError, "block must be int"),
    ],
)
def test_parts_that_cannot_be_read_say_why(text, error, says):
    with pytest.raises(error, match=says):
        registry.parse("edit", text)
