"""`faithful` takes the settings that were published for a model, method by method."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from retouch import registry
from retouch.anatomy import describe
from retouch.edit.base import _published


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("rome", transformers.GPT2Config(n_layer=36, n_embd=1280), {"block": 12, "metric": "covariance"}),
        ("r_rome", transformers.GPT2Config(n_layer=36, n_embd=1280), {"block": 12, "metric": "covariance"}),
        ("rets", transformers.GPT2Config(n_layer=48, n_embd=1600), {"block": 35, "n_steps": 25, "moment_weight": 1}),
        ("rets", transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096), {"block": 22, "moment_weight": 0}),
        (
            "top",
            transformers.GPT2Config(n_layer=48, n_embd=1600),
            {"blocks": (17, 18), "offset": 1, "n_steps_subject": 25},
        ),
        ("top", transformers.GPTJConfig(n_layer=28, n_embd=4096), {"vec_factor": 0.06, "metric": "covariance"}),
        ("emmet", transformers.GPT2Config(n_layer=48, n_embd=1600), {"blocks": (17,), "n_steps": 20, "clamp": 0.75}),
        ("alphaedit", transformers.Qwen2Config(num_hidden_layers=28, hidden_size=3584), {"strength": 1, "clamp": 4}),
        ("pmet", transformers.GPTJConfig(n_layer=28, n_embd=4096), {"moment_weight": 6000, "kl_factor": 1}),
    ],
)
def test_faithful_takes_each_methods_published_row(name, config, settings):
    model = SimpleNamespace(anatomy=describe(config))
    method = registry.make("edit", name, faithful=True).as_published(model)
    assert {key: getattr(method, key) for key in settings} == settings


@pytest.mark.parametrize("name", sorted(_published()))
def test_every_published_row_is_of_settings_that_the_method_takes(name):
    for row in _published()[name]:
        made = registry.make("edit", name, **row["settings"])
        assert {k: made.to_dict()[k] for k in row["settings"]} == row["settings"]
