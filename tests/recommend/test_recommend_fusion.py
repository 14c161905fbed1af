import pytest
import torch

from retouch.recommend.fusion import Fusion


def made(**fields):
    torch.manual_seed(1)
    return Fusion(16, 24, **fields)


@pytest.fixture
def knowledge():
    g = torch.Generator().manual_seed(0)
    return torch.randn(16, generator=g), torch.randn(5, 3, 24, generator=g)


def test_it_begins_with_exactly_nothing(knowledge):
    q0, states = knowledge
    residual, gate = made().with_gate(q0, states)
    assert not residual.any() and torch.equal(gate, torch.full((5,), 0.5))
    assert not made(gate=False)(q0, states).any()


def test_only_the_last_matrix_has_a_gradient_at_first_and_everything_after_one_step(knowledge):
    q0, states = knowledge
    fusion = made()
    goal = torch.randn(5, 16)
    for step in range(2):
        fusion.zero_grad()
        (fusion(q0, states) * goal).sum().backward()
        moved = {name for name, p in fusion.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        if step == 0:
            assert moved == {"out.weight"}
            with torch.no_grad():
                fusion.out.weight -= 0.1 * fusion.out.weight.grad
    assert moved == {name for name, _ in fusion.named_parameters()}


def test_what_a_mask_hides_does_not_matter(knowledge):
    q0, states = knowledge
    fusion = made()
    torch.nn.init.normal_(fusion.out.weight)
    mask = torch.tensor([[True, True, False]] * 5)
    other = states.clone()
    other[:, 2] = 100.0
    torch.testing.assert_close(fusion(q0, states, mask), fusion(q0, states[:, :2]))
    torch.testing.assert_close(fusion(q0, states, mask), fusion(q0, other, mask))
    assert not torch.allclose(fusion(q0, states), fusion(q0, other))


def test_a_user_without_any_knowledge_gives_numbers(knowledge):
    q0, states = knowledge
    states.requires_grad_()
    fusion = made()
    torch.nn.init.normal_(fusion.out.weight)
    out = fusion(q0, states, torch.zeros(5, 3, dtype=torch.bool))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(states.grad).all()


def test_users_do_not_see_each_other(knowledge):
    q0, states = knowledge
    fusion = made()
    torch.nn.init.normal_(fusion.out.weight)
    torch.testing.assert_close(fusion(q0, states)[2:3], fusion(q0, states[2:3]))


def test_the_published_form_replaces_the_first_input(knowledge):
    q0, states = knowledge
    fusion = made(n_layers=3, residual=False)
    residual, gate = fusion.with_gate(q0, states)
    known, at = fusion.narrow(fusion.norm_in(states)), q0.expand(5, -1)
    for look in fusion.looks:
        at = look(at, known, None)
    torch.testing.assert_close(q0 + residual, at)
    assert torch.equal(gate, torch.ones(5)) and residual.abs().sum() > 0 and len(fusion.looks) == 3


def test_attention_against_the_slow_one(knowledge):
    q0, states = knowledge
    fusion = made(n_layers=1)
    look, known = fusion.looks[0], fusion.narrow(fusion.norm_in(states))
    query = look.query(look.norm(q0)).reshape(4, 4)
    for user in range(5):
        keys, values = (part(known[user]).reshape(3, 4, 4) for part in (look.key, look.value))
        heads = [torch.softmax(keys[:, h] @ query[h] / 2.0, 0) @ values[:, h] for h in range(4)]
        torch.testing.assert_close(look(q0[None], known[user : user + 1], None)[0], look.out(torch.cat(heads)))


# ------------------------------------------------ what is the same for everybody


@pytest.fixture
def alike():
    """Knowledge that is nearly the same for everybody, as a language model's states are: 1 % of it tells users apart."""
    g = torch.Generator().manual_seed(3)
    common = 3 * torch.randn(1, 3, 24, generator=g)
    return torch.randn(16, generator=g), common + 0.3 * torch.randn(200, 3, 24, generator=g)


def common_share(rows):
    rows = rows.detach()
    return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())


@pytest.mark.parametrize("gate", [True, False])
def test_what_is_the_same_for_everybody_is_not_added(alike, gate):
    q0, states = alike
    fusion = made(gate=gate)
    torch.nn.init.normal_(fusion.out.weight)
    assert common_share(fusion(q0, states)) > 0.8, "as it comes, knowledge is one constant"
    fusion.begin(q0, states)
    assert common_share(fusion(q0, states)) < 0.02
    assert fusion(q0, states).square().mean() > 0
    masked = made()
    torch.nn.init.normal_(masked.out.weight)
    mask = torch.ones(200, 3, dtype=torch.bool)
    mask[:100, 0] = False
    masked.begin(q0, states, mask)
    torch.testing.assert_close(masked.mean, states[mask].mean(0))
    assert common_share(masked(q0, states, mask)) < 0.02


def test_each_dimension_of_knowledge_counts_by_how_it_tells_users_apart(alike):
    q0, states = alike
    fusion = made()
    fusion.begin(q0, states)
    torch.testing.assert_close(fusion.std, states.std(0, correction=0).mean(0))
    still = made()
    still.begin(q0, states[:1].expand(5, -1, -1))
    assert torch.equal(still.std, torch.ones(24)), "what never moves is not divided by zero"


def test_the_mean_follows_the_users_and_not_the_batch(alike):
    q0, states = alike
    fusion = made()
    torch.nn.init.normal_(fusion.out.weight)
    fusion.begin(q0, states)
    alone, together = fusion(q0, states[:1]), fusion(q0, states)[:1]
    torch.testing.assert_close(alone, together)
    moved = fusion.whole(q0, states)[2] + 2.0
    for _ in range(60):
        fusion.follow(moved)
    torch.testing.assert_close(fusion.middle, moved.mean(0), rtol=1e-2, atol=1e-2)
    fusion.follow(moved[:0])
    assert torch.isfinite(fusion.middle).all()


def test_the_published_form_measures_nothing(alike):
    q0, states = alike
    fusion = made(residual=False)
    before = fusion(q0, states)
    fusion.begin(q0, states)
    fusion.follow(torch.ones(5, 16))
    assert torch.equal(fusion(q0, states), before)
