import numpy as np
import pytest
import torch

from retouch.errors import ModelError, SettingsError
from retouch.model import wrap
from retouch.recommend.knowledge import LanguageKnowledge, TextKnowledge, histories_of

TITLES = [f"{a} {b}" for a in ("Red", "Quiet river", "The capital of", "Tower", "x") for b in ("Paris", "yen", "a b c")]
WINDOWS = torch.tensor(
    [[0, 0, 0, 0, 3], [0, 0, 3, 7, 1], [9, 2, 14, 15, 4], [0, 0, 0, 3, 7], [0, 0, 0, 0, 0]], dtype=torch.int32
)
K = 3


@pytest.fixture
def llm(tiny):
    return lambda name="llama", **fields: wrap(*tiny(name, **fields))


def knows(model, **fields):
    return LanguageKnowledge(model, TITLES, **({"cache_dtype": torch.float32, "text_cache_mib": 8} | fields))


def asked(model, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(n, K, model.anatomy.d_model, generator=g)).requires_grad_()


def rows_of(model, item, titles_as):
    ids = model.tokenizer(TITLES[item - 1], add_special_tokens=False)["input_ids"]
    rows = model.network.get_input_embeddings()(torch.tensor(ids))
    return rows.mean(0, keepdim=True) if titles_as == "pooled" else rows[:12]


def slowly(model, tokens, order, titles_as="pooled", windows=WINDOWS):
    """One user at a time, the whole row through the whole model, nothing kept."""
    found = []
    for row, history in zip(tokens, histories_of(windows)):
        titles = [rows_of(model, int(item), titles_as) for item in history]
        parts = [*titles, row] if order == "suffix" else [row, *titles]
        states = model.network.base_model(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state[0]
        found.append(states[-K:] if order == "suffix" else states[K:])
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("titles_as", ["pooled", "tokens"])
def test_kept_titles_give_the_states_and_gradients_of_the_whole_pass(llm, name, titles_as):
    model = llm(name)
    knowledge = knows(model, titles_as=titles_as)
    slow, fast = asked(model), asked(model)
    wanted = torch.stack(slowly(model, slow, "suffix", titles_as))
    goal = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (wanted * goal).sum().backward()
    for round_ in range(2):  # the second time everything is kept
        if round_:
            knowledge.cache.n_computed = 0
            knowledge.prepare(WINDOWS.numpy())
        fast.grad = None
        got = knowledge.states(fast, WINDOWS)
        assert got.mask is None
        torch.testing.assert_close(got.states, wanted, rtol=1e-4, atol=2e-5)
        (got.states * goal).sum().backward()
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-3, atol=1e-4)
        assert knowledge.cache.n_computed == (2 if round_ else 4), "three of four begin alike"
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


@pytest.mark.parametrize("titles_as", ["pooled", "tokens"])
def test_prefix_order_against_the_whole_pass(llm, titles_as):
    model = llm()
    knowledge = knows(model, order="prefix", titles_as=titles_as)
    slow, fast = asked(model), asked(model)
    wanted = slowly(model, slow, "prefix", titles_as)
    got = knowledge.states(fast, WINDOWS)
    for row, states in enumerate(wanted):
        assert int(got.mask[row].sum()) == len(states)
        torch.testing.assert_close(got.states[row][got.mask[row]], states, rtol=1e-4, atol=2e-5)
    sum(states.sum() for states in wanted).backward()
    (got.states * got.mask[..., None]).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-3, atol=1e-4)


def test_in_front_of_the_titles_an_instruction_knows_nothing_of_them(llm):
    """What the published order puts into the states of the instructions is the same for every history."""
    model = llm()
    tokens = asked(model, 1).detach()[0]
    states = [
        model.network.base_model(inputs_embeds=torch.cat([tokens, rows_of(model, item, "pooled")])[None])
        .last_hidden_state[0, :K]
        for item in (1, 9)
    ]  # fmt: skip
    torch.testing.assert_close(states[0], states[1])
    knowledge = knows(model)
    one, two = (knowledge.states(asked(model, 1).detach(), torch.tensor([[item]])).states for item in (1, 9))
    assert (one - two).abs().max() > 1e-2, "behind them it knows"


def test_one_pass_over_a_window_serves_all_that_begin_alike(llm):
    knowledge = knows(llm())
    knowledge.prepare(np.array([[0, 3, 7, 1], [0, 0, 3, 7], [0, 0, 0, 3], [3, 7, 1, 5], [0, 0, 0, 0]], np.int32))
    assert knowledge.cache.n_computed == 1
    knowledge.states(asked(knowledge.model, 2), torch.tensor([[0, 0, 3, 7], [3, 7, 1, 5]]))
    assert knowledge.cache.n_computed == 1
    knowledge.states(asked(knowledge.model, 1), torch.tensor([[0, 0, 0, 7]]))
    assert knowledge.cache.n_computed == 2, "the same item elsewhere is another state"


def test_batches_padding_and_order_do_not_change_results(llm):
    model = llm()
    for order in ("suffix", "prefix"):
        tokens = asked(model).detach()
        whole = knows(model, order=order).states(tokens, WINDOWS)
        other = torch.tensor([4, 2, 0, 1, 3])
        mixed = knows(model, order=order).states(tokens[other], WINDOWS[other])
        wider = knows(model, order=order).states(tokens, torch.nn.functional.pad(WINDOWS, (3, 0)))
        torch.testing.assert_close(mixed.states, whole.states[other], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wider.states, whole.states, rtol=1e-4, atol=1e-5)
        for row in range(4):
            alone = knows(model, order=order).states(tokens[row : row + 1], WINDOWS[row : row + 1])
            if order == "suffix":
                torch.testing.assert_close(alone.states[0], whole.states[row], rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(
                    alone.states[0][alone.mask[0]], whole.states[row][whole.mask[row]], rtol=1e-4, atol=1e-5
                )


def test_later_items_change_no_knowledge_of_earlier_ones(llm):
    knowledge = knows(llm())
    tokens = asked(knowledge.model, 1).detach()
    knowledge.prepare(np.array([[3, 7, 1, 5]], np.int32))
    after = knows(knowledge.model)
    after.prepare(np.array([[3, 7, 2, 9]], np.int32))
    window = torch.tensor([[0, 0, 3, 7]])
    assert after.cache.n_computed == 1
    torch.testing.assert_close(after.states(tokens, window).states, knowledge.states(tokens, window).states)
    assert after.cache.n_computed == 1


@pytest.mark.parametrize("mib", [0, 1e-5, 0.001])
def test_without_memory_states_are_computed_again_and_equal(llm, mib):
    model = llm()
    tokens = asked(model).detach()
    small, large = knows(model, text_cache_mib=mib), knows(model)
    for knowledge in (small, large):
        knowledge.prepare(WINDOWS.numpy())
    for _ in range(2):
        torch.testing.assert_close(
            small.states(tokens, WINDOWS).states, large.states(tokens, WINDOWS).states, rtol=1e-4, atol=1e-5
        )
    assert small.cache.n_computed > large.cache.n_computed and small.cache.used_mib <= mib


@pytest.mark.parametrize("mib", [0.001, 8])
def test_memory_that_was_never_written_is_never_read(llm, mib):
    """Torch fills such memory with what is not a number when it is asked to be deterministic."""
    model = llm()
    torch.use_deterministic_algorithms(True)
    try:
        knowledge = knows(model, text_cache_mib=mib)
        for _ in range(2):
            assert torch.isfinite(knowledge.states(asked(model).detach(), WINDOWS).states).all()
            knowledge.prepare(WINDOWS.numpy())
    finally:
        torch.use_deterministic_algorithms(False)


def test_half_precision_moves_states_a_little_whether_kept_or_not(llm):
    model = llm()
    tokens = asked(model).detach()
    exact, half = knows(model), knows(model, cache_dtype=torch.float16)
    before = half.states(tokens, WINDOWS).states
    for knowledge in (exact, half):
        knowledge.prepare(WINDOWS.numpy())
    after = half.states(tokens, WINDOWS).states
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert 1e-5 < (exact.states(tokens, WINDOWS).states - after).abs().max() < 2e-2
    assert 0 < half.cache.used_mib == pytest.approx(exact.cache.used_mib / 2)


def test_the_first_blocks_are_a_model_of_their_own(llm, tiny):
    model = llm(n_blocks=3)
    tokens = asked(model).detach()
    short = knows(model, n_llm_layers=2)
    cut, words = tiny("llama", n_blocks=3)
    cut.model.layers = cut.model.layers[:2]
    cut.config.num_hidden_layers = 2
    wanted = slowly(wrap(cut, words), tokens, "suffix")
    torch.testing.assert_close(short.states(tokens, WINDOWS).states, torch.stack(wanted), rtol=1e-4, atol=2e-5)
    assert len(model.network.model.layers) == 3, "the opened model is whole"
    assert short.llm.layers[0] is model.network.model.layers[0], "and its weights are shared"
    assert short.fingerprint != knows(model).fingerprint


def test_the_size_of_the_models_own_embeddings(llm):
    model = llm()
    table = model.network.get_input_embeddings().weight
    assert knows(model).rms == pytest.approx(float(table.square().mean(1).sqrt().mean()), rel=1e-5)


def test_a_title_without_tokens_is_still_a_position(llm):
    model = llm()
    knowledge = LanguageKnowledge(model, ["", "Red"], cache_dtype=torch.float32)
    states = knowledge.states(asked(model, 1), torch.tensor([[1, 2]])).states
    assert torch.isfinite(states).all()


def test_what_cannot_be_asked_is_refused(llm):
    with pytest.raises(ModelError, match="is an encoder"):
        knows(llm("bert"))
    with pytest.raises(SettingsError, match="n_llm_layers must be from 1 to 2, got 3"):
        knows(llm(), n_llm_layers=3)


def test_text_vectors_instead_of_a_language_model():
    vectors = np.random.default_rng(0).normal(size=(15, 8)).astype(np.float32)
    text = TextKnowledge(vectors, 5)
    tokens = torch.randn(5, K, 8, requires_grad=True)
    states = text.states(tokens, WINDOWS).states
    assert states.shape == (5, K, 8)
    torch.testing.assert_close(states[0], torch.from_numpy(vectors[2]).expand(K, -1))
    states.sum().backward()
    assert tokens.grad.abs().sum() > 0 and torch.isfinite(tokens.grad).all()
    assert text.fingerprint != TextKnowledge(vectors[::-1].copy(), 5).fingerprint
    assert "vectors" not in text.state_dict()
