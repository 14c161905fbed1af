"""One tiny artefact of each verb, saved as the command line saves it."""

from __future__ import annotations

from dataclasses import replace

import fuse_asked
import recommend_bundles
import slim_made
import slim_toy

from retouch.fuse.adapter_file import ranks_of, write_adapter
from retouch.model import open_model, wrap
from retouch.slim import api


def slim(folder, pairs=False):
    """A slim classifier of the toy task, with a certificate and a cost."""
    made = slim_made.made(max_harm=0.3)
    if pairs:
        task = {**made.record["task"], "pairs": True}
        made = replace(made, classifier=replace(made.classifier, pairs=True), record={**made.record, "task": task})
    made.save(folder)
    return made


def regression(folder):
    """A slim network that answers with a number."""
    budget, method = {"params": "1/2"}, slim_toy.method(save_every=0)
    made = api.fit(
        slim_made.source(), slim_toy.regression(), budget=budget, method=method, folder=folder.parent / "work"
    )
    made.save(folder)
    return made


def decoder(tiny, folder):
    """A tiny llama, saved and opened from where it is."""
    network, words = tiny("llama")
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    return open_model(folder)


def bundle(tiny, folder):
    """A recommender with knowledge that its certificate allows."""
    run, tokeniser = recommend_bundles.world(wrap(*tiny("llama"), source="tiny llama"))
    return recommend_bundles.save(folder, run, tokeniser)


def adapter(model, folder, seed=0, size=0.3):
    """An adapter of random factors for a base."""
    made = fuse_asked.adapter(model, folder.name, seed, size)
    write_adapter(folder, made.parts.items(), ranks_of(made), model)
    return folder
