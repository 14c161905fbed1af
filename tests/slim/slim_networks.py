"""Tiny slim networks with random weights that all matter, in float64, and batches of texts of different lengths."""

import torch

import families
from retouch.slim.network import SlimConfig, SlimForSequenceClassification

PAD = 1  # mpnet reads this one as padding whatever its configuration says


def network(family="bert", *, blocks=3, seed=0, classes=3, **fields):
    """A network of ours; `fields` are its configuration's."""
    base = families.build(family, n_blocks=blocks, pad_token_id=PAD).config.to_dict()
    if fields.get("task") != "regression":
        fields["id2label"] = {i: f"c{i}" for i in range(classes)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = SlimForSequenceClassification(SlimConfig(base=base, **fields)).double().eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def batch(*lengths, seed=1, classes=3):
    """Texts as a dictionary of ids, mask and labels, padded on the right."""
    noise = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 400, mask.shape, generator=noise)
    ids = torch.where(mask == 1, ids, PAD)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(classes, (len(lengths),), generator=noise),
    }


def inputs(rows):
    """What goes into ``levels``."""
    return {key: rows[key] for key in ("input_ids", "attention_mask")}
