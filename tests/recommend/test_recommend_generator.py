"""The generator: every fast path against the slow one, and that padding, batches and beams decide nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retouch.errors import RetouchError, UserError
from retouch.recommend._layers import Dropout, Grouping, PositionBias, RMSNorm, _ReluDropout
from retouch.recommend.beam import search
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.trie import Trie

SIZES_OF_LEVELS = (5, 4, 6, 3)
HISTORY = 7


def catalogue(n_items=40, seed=0):
    every = np.stack(np.meshgrid(*map(np.arange, SIZES_OF_LEVELS), indexing="ij"), -1).reshape(-1, 4)
    return np.random.default_rng(seed).permutation(every)[:n_items].astype(np.int32)


CODES = catalogue()


def generator(tokens="item", size="tiny", seed=0, **more):
    torch.manual_seed(seed)
    made = Generator(SIZES[size], torch.from_numpy(CODES), SIZES_OF_LEVELS, HISTORY, tokens, **more)
    with torch.no_grad():  # a fresh bias is zero, so a forgotten one would not be noticed
        for bias in (made.encoder_bias, made.decoder_bias):
            bias.weight.normal_()
    return made.eval()


def histories(*lengths, width=HISTORY, seed=1):
    draw = np.random.default_rng(seed)
    rows = [[0] * (width - n) + draw.integers(1, len(CODES) + 1, n).tolist() for n in lengths]
    return torch.tensor(rows)


@pytest.fixture(params=["item", "code"])
def network(request):
    return generator(request.param)


@pytest.fixture
def residual():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- an obvious second network


def attend(attention, states, others, bias):
    keys, values = attention.key_value(others).chunk(2, -1)
    queries, width, seen = attention.query(states), 16, []
    for head in range(2):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / width**0.5
        seen.append((scores + bias[head]).softmax(-1) @ values[:, part])
    return attention.out(torch.cat(seen, -1))


def slowly(network, items, target, extra):
    """Score one item for one history without padding: one request, one position after the other."""
    rows = [torch.tensor(CODES[i - 1]).long() + torch.tensor(network.starts[:-1]) for i in items]
    embedded = [network.embeddings[row] for row in rows]
    if network.tokens == "item":
        ages = network.positions[HISTORY - len(items) :]
        states = torch.stack([network.item_norm(e.sum(0)) + age for e, age in zip(embedded, ages)])
    else:
        states = torch.cat(embedded)
    n = len(states)
    bias = network.encoder_bias(n, n)[0]
    for block in network.encoder:
        normed = block.norms[0](states)
        states = states + attend(block.attention, normed, normed, bias)
        states = states + block.feed_forward.down(F.relu(block.feed_forward.up(block.norms[1](states))))
    memory = network.encoder_norm(states)
    found, written = [], [network.first + extra]
    for level, code in enumerate(CODES[target - 1]):
        states = torch.stack(written)
        bias = network.decoder_bias(len(written), len(written))[0]
        bias = bias.masked_fill(torch.ones(len(written), len(written)).triu(1).bool(), -torch.inf)
        for block in network.decoder:
            normed = block.norms[0](states)
            states = states + attend(block.attention, normed, normed, bias)
            states = states + attend(block.cross, block.norms[1](states), memory, torch.zeros(2, 1, 1))
            states = states + block.feed_forward.down(F.relu(block.feed_forward.up(block.norms[2](states))))
        last = network.decoder_norm(states)[-1]
        heads = network.heads[network.starts[level] : network.starts[level + 1]]
        found.append((heads @ last).log_softmax(-1)[code])
        written.append(network.embeddings[network.starts[level] + code])
    return torch.stack(found), memory.mean(0)


@torch.no_grad()
def test_padded_batches_equal_the_obvious_network(network, residual):
    lengths, targets = (7, 3, 1, 5, 2), torch.tensor([4, 9, 4, 40, 1])
    windows = histories(*lengths)
    memory = network.encode(windows)
    found, pooled = network.code_log_probs(memory, targets, residual), network.pooled(memory)
    for i, n in enumerate(lengths):
        items = windows[i, HISTORY - n :].tolist()
        expected, state = slowly(network, items, int(targets[i]), residual[i])
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled[i], state, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- padding and batches


@torch.no_grad()
def test_padding_and_batch_decide_nothing(network):
    windows, targets = histories(7, 3, 0, 5, 2), torch.tensor([4, 9, 4, 40, 1])
    whole = network.code_log_probs(network.encode(windows), targets)
    for i in range(5):
        alone = network.code_log_probs(network.encode(windows[i : i + 1]), targets[i : i + 1])
        torch.testing.assert_close(whole[i], alone[0], atol=1e-5, rtol=0)
    wider = F.pad(windows, (4, 0))
    torch.testing.assert_close(network.code_log_probs(network.encode(wider), targets), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_only_the_latest_items_are_read(network):
    windows = histories(9, width=9)
    latest = network.pooled(network.encode(windows[:, 2:]))
    torch.testing.assert_close(network.pooled(network.encode(windows)), latest)
    assert (network.pooled(network.encode(windows[:, 3:])) - latest).abs().max() > 1e-3


@torch.no_grad()
def test_an_empty_history_is_a_number_and_its_state_is_zero(network):
    memory = network.encode(histories(0, 0))
    assert torch.equal(network.pooled(memory), torch.zeros(2, 32))
    assert torch.isfinite(network.code_log_probs(memory, torch.tensor([1, 2]))).all()


@torch.no_grad()
def test_order_matters(network):
    windows = histories(6)
    there, back = (network.pooled(network.encode(w)) for w in (windows, torch.roll(windows, 1, 1)))
    assert (there - back).abs().max() > 1e-3


# ---------------------------------------------------------------- scoring


@torch.no_grad()
def test_several_candidates_share_one_memory(network, residual):
    memory = network.encode(histories(7, 3, 1, 5, 2))
    several = torch.tensor([[4, 9, 1], [1, 2, 3], [40, 39, 38], [7, 7, 8], [5, 6, 7]])
    found = network.code_log_probs(memory, several, residual)
    assert found.shape == (5, 3, 4)
    for column in range(3):
        alone = network.code_log_probs(memory, several[:, column], residual)
        torch.testing.assert_close(found[:, column], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_residual_of_zero_is_no_residual(network):
    memory, targets = network.encode(histories(7, 3)), torch.tensor([4, 9])
    assert torch.equal(
        network.code_log_probs(memory, targets, torch.zeros(2, 32)), network.code_log_probs(memory, targets)
    )


@torch.no_grad()
def test_all_words_of_codes_have_probability_one(network):
    every = np.stack(np.meshgrid(*map(np.arange, SIZES_OF_LEVELS), indexing="ij"), -1).reshape(-1, 4)
    network.codes = torch.cat([network.codes[:1], torch.from_numpy(every) + network.codes[0]])
    memory = network.encode(histories(4, 2))
    scores = network.code_log_probs(memory, torch.arange(1, len(every) + 1).repeat(2, 1)).sum(-1)
    torch.testing.assert_close(scores.logsumexp(1), torch.zeros(2), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- steps


@torch.no_grad()
def test_steps_equal_teacher_forcing_whatever_the_beams(network, residual):
    memory = network.encode(histories(7, 3, 0, 5, 2))
    steps = network.stepper(memory, residual)
    draw = np.random.default_rng(5)
    pairs = [(r, tuple(CODES[i])) for r in range(5) for i in draw.choice(40, 1 + 3 * r, replace=False)]
    expected = network.code_log_probs(memory, torch.arange(1, 41).repeat(5, 1), residual)
    place = {tuple(row): i for i, row in enumerate(CODES)}
    before = {}
    for level in range(4):
        beams = sorted({(r, codes[:level]) for r, codes in pairs}, key=lambda _: draw.random())
        rows = torch.tensor([r for r, _ in beams])
        parents = torch.tensor([before.get((r, codes[:-1]), 0) for r, codes in beams])
        found = steps.step(level, rows, torch.tensor([c for _, c in beams]).reshape(len(beams), level), parents)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(beams)), atol=1e-5, rtol=0)
        before = {beam: i for i, beam in enumerate(beams)}
        for r, codes in pairs:
            score = found[before[r, codes[:level]], codes[level]]
            torch.testing.assert_close(score, expected[r, place[codes], level], atol=1e-5, rtol=0)


def test_a_step_out_of_order_is_refused(network):
    steps, row = network.stepper(network.encode(histories(3))), torch.tensor([0])
    with pytest.raises(RetouchError, match="Begin with step 0"):
        steps.step(1, row, torch.tensor([[1]]), row)
    steps.step(0, row, torch.zeros(1, 0, dtype=torch.int64), row)
    with pytest.raises(RetouchError, match="Step 2 was asked for"):
        steps.step(2, row, torch.tensor([[1, 1]]), row)


def test_reading_in_parts_is_reading_at_once(network, monkeypatch):
    windows = histories(7, 3, 0, 5, 7)
    with torch.no_grad():
        whole = network.encode(windows)
        monkeypatch.setattr("retouch.recommend.generator._CACHED", 14)
        parts = network.encode(windows)
    assert torch.equal(parts.mask, whole.mask)
    torch.testing.assert_close(parts.states, whole.states, atol=1e-5, rtol=0)


def test_the_quick_norm_is_torchs_own():
    norm, states = RMSNorm(48), torch.randn(3, 5, 48) * 3
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        quick = norm(states)
    torch.testing.assert_close(quick, norm(states).detach(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("beams", [40, 6])
def test_a_search_scores_as_teacher_forcing_does(network, residual, beams):
    memory = network.encode(histories(7, 3, 0, 5, 2))
    found = search(network.stepper(memory, residual), Trie.of(CODES), 5, beams=beams)
    scores = network.code_log_probs(memory, found.items, residual).sum(-1)
    torch.testing.assert_close(found.scores, scores, atol=1e-5, rtol=0)
    if beams == 40:
        every = network.code_log_probs(memory, torch.arange(1, 41).repeat(5, 1), residual).sum(-1)
        assert torch.equal(found.items, every.argsort(1, descending=True) + 1)


@torch.no_grad()
def test_a_search_does_not_depend_on_its_batch(network):
    windows, trie = histories(7, 3, 0, 5, 2), Trie.of(CODES)
    whole = search(network.stepper(network.encode(windows)), trie, 5, beams=8)
    for i in range(5):
        alone = search(network.stepper(network.encode(windows[i : i + 1])), trie, 1, beams=8)
        assert torch.equal(alone.items[0], whole.items[i])
        torch.testing.assert_close(alone.scores[0], whole.scores[i], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- learning


def test_gradients_reach_every_weight_and_agree_with_dropout_off(network):
    windows, targets = histories(7, 3, 4, 5, 2), torch.tensor([4, 9, 4, 40, 1])

    def gradients():
        network.zero_grad()
        network.code_log_probs(network.encode(windows), targets).sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    still = gradients()
    unused = {"item_norm.weight", "item_norm.bias"} if network.tokens == "code" else set()
    assert {name for name, _ in network.named_parameters()} - set(still) == unused
    assert all(bool(g.abs().sum() > 0) for g in still.values())
    for module in network.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    network.train()  # the path of training, which computes attention by hand
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, still[name], atol=1e-4, rtol=1e-4)


def test_a_tiny_generator_learns_what_follows_what():
    network, draw = generator(size="tiny", dropout=0.0).train(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3, fused=True)
    for _ in range(150):
        last = torch.from_numpy(draw.integers(1, 41, 64))
        windows = torch.cat([histories(*[6] * 64, width=6, seed=draw.integers(1 << 30)), last[:, None]], 1)
        loss = -network.code_log_probs(network.encode(windows), last % 40 + 1).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    last = torch.arange(1, 41)
    windows = torch.cat([histories(*[6] * 40, width=6, seed=99), last[:, None]], 1)
    best = search(network.stepper(network.encode(windows)), Trie.of(CODES), 40, beams=5).items[:, 0]
    assert (best == last % 40 + 1).float().mean() > 0.9


# ---------------------------------------------------------------- layers


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    drop, ones = Dropout(0.3).train(), torch.ones(7, 14_287)
    dropped = drop(ones)
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    for remainder in range(4):  # one draw of 64 bits serves four numbers, all alike
        assert abs(float((dropped.flatten()[remainder::4] == 0).float().mean()) - 0.3) < 0.02
    assert torch.equal(drop.eval()(ones), ones)


def test_relu_with_dropout_has_the_gradient_of_its_parts():
    states = torch.randn(50, 40, requires_grad=True, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    out = _ReluDropout.apply(states, 0.25)
    kept = (out > 0) / (1 - 0.25)
    torch.testing.assert_close(out, states.clamp(min=0) * kept)
    weights = torch.randn(50, 40)
    (out * weights).sum().backward()
    torch.testing.assert_close(states.grad, weights * kept)


@torch.no_grad()
@pytest.mark.parametrize("two_sided", [True, False])
def test_near_distances_have_a_bucket_each_and_far_ones_share(two_sided):
    bias = PositionBias(1, two_sided=two_sided)
    bias.weight.copy_(torch.arange(32)[:, None])
    found = bias(200, 200)[0, 0]
    near = 8 if two_sided else 16
    assert len({float(found[199, 199 - i]) for i in range(near)}) == near
    assert found[199, 0] == found[199, 40] == (15 if two_sided else 31)
    assert found[150, 20] >= found[150, 100] > found[150, 149]
    side = found[0, 1:]
    assert (side == 0).all() if not two_sided else (side >= 16).all()
    torch.testing.assert_close(bias(1, 9)[0, :, 0], bias(9, 9)[0, :, 8])


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0, 2, 2, 2], [2, 0, 2, 1, 0], [0, 1, 1]])
def test_rows_lie_with_their_request_and_come_back(rows):
    grouping = Grouping(torch.tensor(rows), 3)
    states = torch.arange(len(rows) * 4.0).reshape(len(rows), 4) + 1
    laid = grouping.together(states)
    for request in range(3):
        mine = {tuple(states[i].tolist()) for i, r in enumerate(rows) if r == request}
        assert {tuple(v) for v in laid[request].tolist()} - {(0.0,) * 4} == mine
    assert torch.equal(grouping.apart(laid), states)


# ---------------------------------------------------------------- sizes and mistakes


@pytest.mark.parametrize(
    ("size", "levels", "millions"), [("small", (64, 64, 64, 16), 0.26), ("base", (256,) * 3 + (16,), 4.66)]
)
def test_sizes_have_the_stated_parameters(size, levels, millions):
    made = Generator(SIZES[size], torch.zeros(1, 4, dtype=torch.long), levels)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"Level 1 of the codes has 4 codes, 0 to 3; the catalogue holds 0 to 4"):
        Generator(SIZES["tiny"], torch.tensor([[0, 4], [1, 0]]), (2, 4))
    with pytest.raises(UserError, match="one column for each of 3 levels"):
        Generator(SIZES["tiny"], torch.tensor([[0, 1]]), (2, 4, 4))
