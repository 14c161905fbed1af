import pytest
import torch
import torch.nn.functional as F

from retouch.recommend.instruction import GlobalInstructions, Instructions, PromptInstructions

D, LLM = 16, 24


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(3)
    centres = 3 * torch.randn(6, D, generator=g)
    return centres[torch.arange(240) % 6] + 0.2 * torch.randn(240, D, generator=g) + 5.0


def made(states=None, **fields):
    torch.manual_seed(0)
    books = Instructions(D, LLM, **({"n_books": 3, "n_codewords": 8, "d_code": 8, "rms": 0.7} | fields))
    if states is not None:
        books.begin(states)
    return books


def test_tokens_come_from_the_chosen_words_to_the_last_bit(states):
    books = made(states)
    chosen = books(states[:20])
    words = F.normalize(books.words, dim=-1)
    hard = words[torch.arange(3), chosen.codes]
    assert torch.equal(chosen.tokens, books._tokens(hard))
    assert chosen.codes.shape == (20, 3) and chosen.tokens.shape == (20, 3, LLM)


def test_the_word_that_is_chosen_is_the_nearest(states):
    books = made(states)
    wanted = books._wanted((states - books.mean) / books.std)
    distance = (wanted[:, :, None] - F.normalize(books.words, dim=-1)).square().sum(-1)
    assert torch.equal(books(states).codes, distance.argmin(-1))


def test_the_gradient_is_that_of_the_index_distribution(states):
    """Against the form of the paper: e = onehot - stopgrad(p) + p and z = e^T C."""
    books = made(states)
    goal = torch.randn(12, 3, LLM)
    (books(states[:12]).tokens * goal).sum().backward()
    fast = {name: p.grad.clone() for name, p in books.named_parameters() if p.grad is not None}
    books.zero_grad()
    standard = (states[:12] - books.mean) / books.std
    words = F.normalize(books.words, dim=-1)
    likeness = torch.einsum("bkc,kvc->bkv", books._wanted(standard), words)
    shares = (likeness / books.temperature).softmax(-1)
    e = F.one_hot(likeness.argmax(-1), 8).float() - shares.detach() + shares
    (books._tokens(torch.einsum("bkv,kvc->bkc", e, words)) * goal).sum().backward()
    for name, p in books.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(fast[name], p.grad, rtol=1e-4, atol=1e-5)
    assert (fast["words"].abs().sum(-1) > 0).all(), "every word of every book is reached"
    assert fast["ask"].abs().sum() > 0


def test_tokens_begin_at_the_size_of_the_language_models_own(states):
    tokens = made(states)(states).tokens
    torch.testing.assert_close(tokens.square().mean(-1).sqrt(), torch.full((240, 3), 0.7), rtol=1e-4, atol=1e-4)


def test_losses_by_hand(states):
    books = made(states)
    batch = states[:30]
    losses = books(batch).losses
    standard = (batch - books.mean) / books.std
    u, words = books._wanted(standard), F.normalize(books.words, dim=-1)
    p = (torch.einsum("bkc,kvc->bkv", u, words) / 0.1).softmax(-1)
    z = words[torch.arange(3), books(batch).codes]
    entropy = -(p * p.log()).sum(-1)
    mean = p.mean(0)
    by_hand = {
        "vq": 2.25 * (z - u).square().sum(-1).mean(),
        "ae": (books.recall(z.flatten(1)) - standard).square().mean(),
        "ent": entropy.mean() + (mean * mean.log()).sum(-1).mean(),
    }
    assert losses.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert books(batch).losses == {}


def test_a_common_mean_does_not_hide_the_users(states):
    """The states lie around 5, far from the origin: unstandardised they would all ask for one word."""
    told = made(states)(states).codes
    assert len(torch.unique(told, dim=0)) >= 6
    groups = [told[i::6] for i in range(6)]
    assert sum(len(torch.unique(group, dim=0)) for group in groups) < 120, "users who are alike share instructions"


def test_books_start_where_users_are(states):
    books = made(states)
    standard = (states - books.mean) / books.std
    likeness = torch.einsum("bkc,kvc->bkv", books._wanted(standard), F.normalize(books.words, dim=-1)).amax(-1)
    assert likeness.mean() > 0.9
    fresh = made()
    fresh.mean.copy_(books.mean), fresh.std.copy_(books.std)
    at_random = torch.einsum("bkc,kvc->bkv", books._wanted(standard), F.normalize(fresh.words, dim=-1)).amax(-1)
    assert likeness.mean() > at_random.mean() + 0.1


def test_begin_is_the_same_for_the_same_seed_and_takes_few_users(states):
    one, two = made(states), made(states)
    assert torch.equal(one.words, two.words)
    few = made(states[:5])
    assert torch.isfinite(few(states[:5]).tokens).all()


def test_usage_of_collapsed_and_even_books(states):
    books = made(states)
    even = torch.arange(8).repeat(3, 5).T
    assert all(u.used == 1.0 and u.perplexity == pytest.approx(1.0) for u in books.measure(even))
    one = books.measure(torch.zeros(40, 3, dtype=torch.int64))[0]
    assert (one.used, one.perplexity, one.largest) == (0.125, pytest.approx(0.125), 1.0)


def test_unused_words_are_given_to_the_users_described_worst(states):
    books = made(states)
    optimizer = torch.optim.AdamW(books.parameters(), lr=1e-3)
    sum(books(states).losses.values()).backward()
    optimizer.step()
    with torch.no_grad():
        books.words[1, 4] = -books.words[1].mean(0) * 100
    books.usage[1, 4] = 0.0
    before = books.words.detach().clone()
    assert books.revive(states, optimizer) == 1
    wanted = books._wanted((states - books.mean) / books.std)[:, 1]
    likeness = (wanted @ F.normalize(before[1], dim=-1).T).amax(1)
    assert torch.equal(books.words[1, 4], wanted[likeness.argmin()])
    kept = torch.ones(3, 8, dtype=torch.bool)
    kept[1, 4] = False
    assert torch.equal(books.words[kept], before[kept])
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[books.words][moment][1, 4].abs().sum() == 0
        assert (optimizer.state[books.words][moment][kept].abs().sum(-1) > 0).all()
    assert books.usage[1, 4] == 1 / 8 and books.revive(states, optimizer) == 0


def test_counting_forgets_slowly(states):
    books = made(states)
    for _ in range(300):
        books.count(torch.zeros(10, 3, dtype=torch.int64))
    assert books.usage[:, 0].min() > 0.9 and books.usage[:, 1:].max() < 1 / (20 * 8)
    torch.testing.assert_close(books.usage.sum(1), torch.ones(3))


def test_without_books_the_state_itself_speaks(states):
    books = made(states, quantise=False)
    chosen = books(states)
    assert set(chosen.losses) == {"ae"} and books.revive(states) == 0
    assert len(torch.unique(chosen.tokens, dim=0)) == len(states)


@pytest.mark.parametrize("kind", ["global", "prompt"])
def test_instructions_that_are_not_personal(states, kind):
    rows = torch.randn(4, LLM)
    books = GlobalInstructions(LLM, 4, 0.3) if kind == "global" else PromptInstructions(rows)
    chosen = books(states[:7])
    assert chosen.tokens.shape == (7, 4, LLM) and not chosen.codes.any() and chosen.losses == {}
    assert all(torch.equal(row, chosen.tokens[0]) for row in chosen.tokens)
    assert len(list(books.parameters())) == (2 if kind == "global" else 0)
    if kind == "prompt":
        assert torch.equal(chosen.tokens[0], rows)


@pytest.mark.parametrize(
    "parts", [Instructions(6, 8, n_books=3, n_codewords=4, d_code=5), GlobalInstructions(8, 2), PromptInstructions(torch.ones(4, 8))]
)  # fmt: skip
def test_codes_alone_are_those_that_come_with_tokens(parts):
    state = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(parts.codes(state), parts(state).codes)
