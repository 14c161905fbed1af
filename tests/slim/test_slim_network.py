"""The slim network is its original at full width, whatever the family and the padding, and survives its folder."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

import families
from retouch.errors import ModelError, StoreError, UserError
from retouch.model import open_model, wrap
from retouch.slim.losses import hard_loss
from retouch.slim.network import (
    SlimConfig,
    SlimForSequenceClassification,
    from_classifier,
    from_encoder,
    open_slim,
    prove,
    save,
    with_exits,
)
from retouch.slim.widths import parameters

ENCODERS = families.ENCODERS
CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
}
PAD = 1  # mpnet reads this one as padding whatever its configuration says
LENGTHS = (9, 4, 1, 6)
UNEVEN = {"heads": [2, 4, 1], "d_ff": [24, 64, 8], "kept_heads": [[1, 3], [0, 1, 2, 3], [2]]}


def classifier(family, **fields):
    """A classifier of transformers, in float64."""
    config = families.build(family, n_blocks=3, pad_token_id=PAD).config
    values = {"num_labels": 3} | fields
    config = type(config).from_dict(config.to_dict() | values)
    torch.manual_seed(0)
    network = getattr(transformers, CLASSIFIERS[family])(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def slim(family="bert", **fields):
    """A network of ours with random weights that all matter, in float64."""
    base = families.build(family, n_blocks=3, pad_token_id=PAD).config.to_dict()
    torch.manual_seed(0)
    network = SlimForSequenceClassification(SlimConfig(base=base, **fields)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def batch(side="right", extra=0, types=False):
    """Texts of different lengths: ids and mask, and token types where they are asked for."""
    torch.manual_seed(1)
    width = max(LENGTHS) + extra
    ids, mask = torch.full((len(LENGTHS), width), PAD), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    kinds = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        place = slice(0, n) if side == "right" else slice(width - n, None)
        ids[row, place], mask[row, place] = torch.randint(5, 400, (n,)), 1
        kinds[row, place] = (torch.arange(n) > n // 2).long()
    return (ids, mask, kinds) if types else (ids, mask)


@torch.no_grad()
def answers(network, *inputs):
    return network(*inputs).logits


# ---------------------------------------------------------------- from an original


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_keeps_its_logits(family, side):
    original = classifier(family)
    network = from_classifier(original)
    ids, mask = batch()
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask).logits
        rows = [original(input_ids=i[m == 1][None]).logits for i, m in zip(ids, mask, strict=True)]
    assert torch.allclose(wanted, torch.cat(rows), rtol=0, atol=1e-12)  # so it is the right thing to compare with
    assert torch.allclose(answers(network, *batch(side)), wanted, rtol=0, atol=1e-12)
    assert not network.training and network.widths.exits == (2,)


def test_token_types_are_read_as_the_original_reads_them():
    original = classifier("bert")
    ids, mask, types = batch(types=True)
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    network = from_classifier(original)
    assert torch.allclose(answers(network, ids, mask, types), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(answers(network, ids, mask), wanted, rtol=0, atol=1e-3)


def test_the_original_is_neither_changed_nor_shared():
    original = classifier("bert")
    before = copy.deepcopy(original.state_dict())
    network = from_classifier(original)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())


def test_names_of_classes_stay():
    names = {0: "no", 1: "perhaps", 2: "yes"}
    network = from_classifier(classifier("bert", id2label=names, label2id={v: k for k, v in names.items()}))
    assert network.config.id2label == names and network.config.label2id["yes"] == 2


def test_one_output_for_two_classes_becomes_two_logits():
    original = classifier("roberta", num_labels=1, problem_type="multi_label_classification", id2label={0: "toxic"})
    network = from_classifier(original)
    ids, mask = batch()
    with torch.no_grad():
        z = original(input_ids=ids, attention_mask=mask).logits
    got = answers(network, ids, mask)
    assert torch.equal(got[:, 0], torch.zeros(len(ids)).double())
    assert torch.allclose(got[:, 1:], z, rtol=0, atol=1e-12)
    assert network.config.id2label == {0: "not toxic", 1: "toxic"} and network.config.task == "classification"


def test_one_output_without_a_problem_type_is_a_regression():
    original = classifier("distilbert", num_labels=1)
    network = from_classifier(original)
    ids, mask = batch()
    with torch.no_grad():
        wanted = original(input_ids=ids, attention_mask=mask).logits
    assert network.config.task == "regression" and network.config.problem_type == "regression"
    assert torch.allclose(answers(network, ids, mask), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("headless", [True, False])
def test_an_encoder_gets_fresh_exits_and_keeps_its_states(headless, tiny_tokenizer):
    source = families.build("bert", n_blocks=3, headless=headless)
    model = wrap(source, tiny_tokenizer)
    torch.manual_seed(3)
    network = from_encoder(model, ["no", "yes"])
    ids, mask = batch()
    with torch.no_grad():
        wanted = source.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        got = network.eval().levels(ids, mask)
    for ours, theirs in zip(got.hidden, wanted, strict=True):
        assert torch.allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)
    assert list(got.logits) == [0, 1, 2] and network.config.id2label == {0: "no", 1: "yes"}
    assert all(p.requires_grad for p in network.parameters())
    if headless:
        assert torch.equal(network.pooler.weight, source.pooler.dense.weight)
    for exit_ in network.exits.values():
        assert 0.01 < exit_.weight.std() < 0.03 and not exit_.bias.any()
    torch.manual_seed(3)
    again = from_encoder(model, ["no", "yes"])
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in network.state_dict().items())


def test_an_encoder_without_labels_becomes_a_regression(tiny_tokenizer):
    network = from_encoder(wrap(families.build("mpnet"), tiny_tokenizer), None, exits=[0], pooler=None)
    assert network.config.task == "regression" and network.size.classes == 1
    assert network.widths.exits == (0, 1) and network.pooler is None


def test_pooling_is_the_one_that_the_folder_states(tmp_path, tiny_tokenizer):
    families.build("bert", headless=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert from_encoder(open_model(tmp_path / "model"), ["a", "b"]).config.pooling == "first"
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model = open_model(tmp_path / "model")
    assert from_encoder(model, ["a", "b"]).config.pooling == "mean"
    assert from_encoder(model, ["a", "b"], pooling="first").config.pooling == "first"


def test_exits_can_be_added_to_a_network():
    original = from_classifier(classifier("bert"))
    network = with_exits(original, [0]).eval()
    assert network.widths.exits == (0, 2) and network.pooler is None and original.widths.exits == (2,)
    ids, mask = batch()
    with torch.no_grad():
        ours, theirs = network.levels(ids, mask), original.levels(ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden, theirs.hidden, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_is_refused(name, tiny):
    with pytest.raises(ModelError, match=f"a {name} model, which is a decoder"):
        from_classifier(tiny(name)[0])


def test_an_unknown_family_is_refused():
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ModelError, match=r"bert, distilbert, roberta, mpnet.*family 'vit'"):
        from_classifier(transformers.ViTForImageClassification(config))


def test_what_is_no_classifier_or_one_of_many_labels_is_refused(tiny_tokenizer):
    with pytest.raises(ModelError, match="BertForSequenceClassification is expected; this is a BertForMaskedLM"):
        from_classifier(families.build("bert"))
    with pytest.raises(ModelError, match=r"3 labels.*multi-label"):
        from_classifier(classifier("bert", problem_type="multi_label_classification"))
    with pytest.raises(ModelError, match="slim already"):
        from_classifier(slim())
    with pytest.raises(ModelError, match="is_decoder"):
        from_classifier(classifier("bert", is_decoder=True))
    with pytest.raises(ModelError, match="at least two labels"):
        from_encoder(wrap(families.build("bert"), tiny_tokenizer), ["only"])
    with pytest.raises(ModelError, match=f"{len(tiny_tokenizer)} tokens and the model 300 rows"):
        from_classifier(classifier("bert", vocab_size=300), tiny_tokenizer)


# ---------------------------------------------------------------- narrower


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("pooler", [None, "tanh"])
def test_the_numbers_are_those_of_the_formula(family, pooler):
    for fields in ({}, UNEVEN | {"rank": 12, "exits": [0, 2]}):
        network = slim(family, pooler=pooler, **fields)
        extra = 32 * 32 + 32 if pooler else 0
        assert sum(p.numel() for p in network.parameters()) == parameters(network.size, network.widths) + extra


@pytest.mark.parametrize("family", ENCODERS)
def test_fewer_heads_and_neurons_are_the_full_network_with_the_others_silent(family):
    neurons = [list(range(0, 48, 2)), list(range(64)), [1, 3, 5, 7, 60, 61, 62, 63]]
    full, small = slim(family), slim(family, **UNEVEN, kept_neurons=neurons)
    k = full.size.head_dim
    small.exits.load_state_dict(full.exits.state_dict())
    alike = {n: v for n, v in full.body.state_dict().items() if v.shape == small.body.state_dict()[n].shape}
    small.body.load_state_dict(alike, strict=False)
    silenced = []
    for block in range(3):
        assert small.kept_heads(block) == UNEVEN["kept_heads"][block] and small.kept_neurons(block) == neurons[block]
        rows = torch.tensor([k * head + i for head in small.kept_heads(block) for i in range(k)])
        ours, theirs = small.parts(block), full.parts(block)
        with torch.no_grad():
            for name, ids in {"query": rows, "key": rows, "value": rows, "up": torch.tensor(neurons[block])}.items():
                getattr(ours, name).weight.copy_(getattr(theirs, name).weight[ids])
                getattr(ours, name).bias.copy_(getattr(theirs, name).bias[ids])
            for name, ids in {"out": rows, "down": torch.tensor(neurons[block])}.items():
                getattr(ours, name).weight.copy_(getattr(theirs, name).weight[:, ids])
                getattr(ours, name).bias.copy_(getattr(theirs, name).bias)
                seen = torch.zeros(getattr(theirs, name).in_features, dtype=torch.float64).index_fill(0, ids, 1)
                hook = lambda module, inputs, seen=seen: (inputs[0] * seen,)  # noqa: E731
                silenced.append(getattr(theirs, name).register_forward_pre_hook(hook))
    ids, mask = batch()
    with torch.no_grad():
        got, wanted = small.levels(ids, mask), full.levels(ids, mask)
    assert len(silenced) == 6
    for block in range(3):
        assert torch.allclose(got.logits[block], wanted.logits[block], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", ENCODERS)
def test_padding_changes_no_level(family, pooling):
    network = slim(family, pooling=pooling, rank=12, **UNEVEN)
    ids, mask, types = batch(types=True)
    with torch.no_grad():
        wanted = network.levels(ids, mask, types)
        for side, extra in (("left", 0), ("right", 7), ("left", 7)):
            more = batch(side, extra, types=True)
            got = network.levels(*more)
            for ours, theirs in zip(got.hidden, wanted.hidden, strict=True):
                assert torch.allclose(ours[more[1] == 1], theirs[mask == 1], rtol=0, atol=1e-12)
            for block, logits in wanted.logits.items():
                assert torch.allclose(got.logits[block], logits, rtol=0, atol=1e-12)


def test_rows_without_a_real_token_give_numbers():
    network = slim(pooling="mean")
    ids, mask = batch()
    mask[1] = 0
    assert all(torch.isfinite(z).all() for z in network.levels(ids, mask).logits.values())


def test_the_embedding_is_two_factors():
    network = slim(rank=12)
    factors = network.get_input_embeddings()
    assert factors.table.weight.shape == (network.size.vocab, 12) and factors.map.bias is None
    ids = torch.tensor([[5, 7]])
    assert torch.allclose(factors(ids)[0], (factors.table.weight @ factors.map.weight.T)[[5, 7]])


def test_the_vocabulary_stays():
    for network in (slim(), slim(rank=12)):
        with pytest.raises(ModelError, match="keeps its vocabulary"):
            network.resize_token_embeddings(600)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"base": {"model_type": "llama"}}, "decoder"),
        ({"base": {}}, "needs base"),
        ({"heads": [4, 4, 5]}, "heads 5 is more"),
        ({"heads": [4, 4]}, "entry a block|blocks"),
        ({"exits": [0, 1]}, "last block"),
        ({"rank": 99}, "rank 99"),
        ({"kept_heads": [[0], [1], [2]]}, "kept_heads lists"),
        ({"kept_heads": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 4]]}, "block 2 must be different numbers from 0 to 3"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"pooler": "gelu"}, "pooler must be one of"),
        ({"task": "tagging"}, "task must be one of"),
        ({"task": "regression", "id2label": {0: "a", 1: "b"}}, "one output"),
        ({"task": "regression", "target_scale": 0.0}, "target_scale"),
        ({"temperatures": [1.0]}, "1 temperatures"),
        ({"format": 2}, "format 2"),
    ],
)
def test_a_wrong_field_is_named(fields, says):
    with pytest.raises(UserError, match=says):
        slim_with(fields)


def slim_with(fields):
    base = families.build("bert", n_blocks=3).config.to_dict()
    SlimForSequenceClassification(SlimConfig(**({"base": base} | fields)))


def test_an_exit_that_is_not_there_is_named():
    network = slim(exits=[0, 2])
    ids, mask = batch()
    with pytest.raises(UserError, match=r"no exit after block 1.*\[0, 2\]"):
        network.read_exit(1, network.embed(ids, mask), mask)
    with pytest.raises(UserError, match="no exit after block 1"):
        network.levels(ids, mask, exits=[1])


# ---------------------------------------------------------------- forward


def test_while_training_the_loss_is_the_sum_over_exits():
    network = slim(exit_dropout=0.0, **UNEVEN)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in network.body.encoder.layer:
        block.attention.self.dropout.p = 0.0
    ids, mask = batch()
    y = torch.tensor([0, 1, 1, 0])
    trained = network.train()(ids, mask, labels=y)
    read = network.eval()(ids, mask, labels=y)
    assert list(trained.exit_logits) == [0, 1, 2]
    assert torch.allclose(trained.loss, hard_loss(network.levels(ids, mask).logits, y, "classification"))
    assert torch.allclose(read.loss, torch.nn.functional.cross_entropy(read.logits, y))
    assert torch.equal(read.exit_block, torch.full((4,), 2)) and read.hidden_states is None
    assert network(ids, mask).loss is None


def test_while_training_gradients_are_means():
    network, ids, mask = slim(), *batch()
    y = torch.tensor([0, 1, 1, 0])
    found = []
    for training in (True, False):
        network.zero_grad()
        network.train(training)
        for module in network.modules():
            module.training = False  # no dropout
        network.training = training
        loss = (
            network(ids, mask, labels=y).loss
            if training
            else hard_loss(network.levels(ids, mask).logits, y, "classification")
        )
        loss.backward()
        found.append(network.body.embeddings.position_embeddings.weight.grad.clone())
    assert torch.allclose(3 * found[0], found[1], rtol=1e-10)


def test_a_regression_answers_in_the_units_of_its_labels():
    network = slim(task="regression", target_mean=3.0, target_scale=2.0)
    ids, mask = batch()
    y = torch.tensor([3.0, 5.0, 1.0, 3.0])
    output = network(ids, mask, labels=y)
    z = output.exit_logits[2]
    assert torch.allclose(output.logits, 3 + 2 * z)
    assert torch.allclose(output.loss, (z[:, 0] - torch.tensor([0.0, 1.0, -1.0, 0.0])).square().mean())


def test_levels_are_returned_on_request_and_a_tuple_too():
    network, (ids, mask) = slim(), batch()
    output = network(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(network(ids, mask, return_dict=False)[0], output.logits)
    assert torch.equal(network(ids).logits, network(ids, torch.ones_like(ids)).logits)


def test_with_a_threshold_rows_leave_early():
    network, (ids, mask) = slim(), batch()
    exits = network(ids, mask).exit_logits
    network.config.threshold = 2.0  # above every uncertainty
    output = network(ids, mask, labels=torch.tensor([0, 1, 1, 0]))
    assert torch.equal(output.exit_block, torch.zeros(4, dtype=torch.long)) and output.exit_logits is None
    assert torch.allclose(output.logits, exits[0], rtol=0, atol=1e-12) and output.loss.ndim == 0
    network.config.threshold = 0.0
    assert torch.allclose(network(ids, mask).logits, exits[2], rtol=0, atol=1e-12)
    assert network.train()(ids, mask).exit_logits is not None  # all exits learn, whatever the threshold


def test_a_trainer_sees_one_set_of_logits(tmp_path):
    network = slim().float()
    ids, mask = batch()
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": r % 2} for r, (i, m) in enumerate(zip(ids, mask, strict=True))
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, per_device_train_batch_size=2, max_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        learning_rate=0.01,
    )  # fmt: skip

    def accuracy(found):
        assert found.predictions.shape == (4, 2)
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = transformers.Trainer(network, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)
    before = network.exits["0"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, network.exits["0"].weight)
    measured = trainer.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= set(measured)


# ---------------------------------------------------------------- saved


READ = """
import sys, torch
for name in sys.argv[1].split(","):
    __import__(name)
import transformers
network = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[2], local_files_only=True)
torch.set_num_threads(1)  # as the tests do: more threads add in another order
inputs = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(network.eval()(**inputs).logits, sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["retouch.slim,transformers", "transformers,retouch.slim"])
def test_a_fresh_process_reads_the_same_bits(order, tmp_path, tiny_tokenizer):
    network = slim(rank=12, exits=[0, 2], pooler="tanh", **UNEVEN)
    save(network, tiny_tokenizer, tmp_path / "model")
    ids, mask = batch()
    torch.save({"input_ids": ids, "attention_mask": mask}, tmp_path / "inputs")
    run = [sys.executable, "-c", READ, order, tmp_path / "model", tmp_path / "inputs", tmp_path / "logits"]
    subprocess.run([str(part) for part in run], check=True, capture_output=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), answers(network, ids, mask))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folder_gives_the_same_bits(family, dtype, tmp_path, tiny_tokenizer):
    labels = {0: "bad", 1: "good", 2: "fair"}
    fields = {"id2label": labels, "threshold": 0.25, "temperatures": [1.0, 2.0, 0.5], "every": 2, "rule": "margin"}
    network = slim(family, rank=12, **UNEVEN, **fields).to(dtype)
    save(network, tiny_tokenizer, tmp_path / "model", record={"seed": 3})
    opened = open_slim(tmp_path / "model")
    assert opened.state_dict().keys() == network.state_dict().keys() and not opened.training
    assert all(torch.equal(v, opened.state_dict()[n]) for n, v in network.state_dict().items())
    ids, mask, types = batch(types=True)
    ours, theirs = network.levels(ids, mask, types), opened.levels(ids, mask, types)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden, theirs.hidden, strict=True))
    assert opened.widths == network.widths and opened.size == network.size
    assert opened.config.id2label == labels and opened.kept_heads(2) == [2]
    assert {k: getattr(opened.config, k) for k in fields} == fields


def test_a_folder_holds_no_pickle_and_says_what_it_is(tmp_path, tiny_tokenizer):
    save(slim(), tiny_tokenizer, tmp_path / "model", record={"seed": 3})
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert {"config.json", "model.safetensors", "retouch.json", "README.md", "manifest.json", "tokenizer.json"} <= names
    assert all(name.endswith((".json", ".safetensors", ".md", ".txt", ".jinja")) for name in names)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "retouch_slim" and config["base"]["model_type"] == "bert" and config["format"] == 1
    assert config["architectures"] == ["SlimForSequenceClassification"]
    assert json.loads((tmp_path / "model" / "retouch.json").read_text()) == {"kind": "slim", "format": 1, "seed": 3}
    save(slim(), tiny_tokenizer, tmp_path / "model")  # ours gives way


def test_a_pipeline_answers_from_the_folder(tmp_path, tiny_tokenizer):
    network = slim(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, rank=12, **UNEVEN).float()
    save(network, tiny_tokenizer, tmp_path / "model")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    found = pipeline(["The capital of France is Paris.", "Rome"], top_k=None)
    inputs = tiny_tokenizer(["Rome"], return_tensors="pt", return_token_type_ids=False)
    wanted = answers(network, inputs["input_ids"], inputs["attention_mask"]).softmax(-1)[0]
    assert {one["label"]: one["score"] for one in found[1]} == pytest.approx(
        {"bad": float(wanted[0]), "good": float(wanted[1])}, abs=1e-5
    )


def test_a_folder_that_is_not_slim_is_refused(tmp_path, tiny_tokenizer):
    families.build("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="'bert' model, which is not slim"):
        open_slim(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_slim(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path, tiny_tokenizer):
    save(slim(), tiny_tokenizer, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    with pytest.raises(StoreError):
        open_slim(tmp_path / "model")


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path):
    network = slim()
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": [64, 64, 32]}))
    with pytest.raises(ModelError, match="cannot be opened"):
        open_slim(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"pooler": "tanh"}))
    with pytest.raises(ModelError, match="lacks 2 weights"):
        open_slim(tmp_path)


def test_a_network_that_lies_about_its_widths_does_not_pass():
    network = slim()
    network.parts(1)  # as it is it passes
    prove(network)
    network.body.encoder.layer[1].intermediate.dense = torch.nn.Linear(32, 40).double()
    with pytest.raises(ModelError, match="Block 1"):
        prove(network)
    network = slim()
    network.exits["0"].bias.data[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        prove(network)
