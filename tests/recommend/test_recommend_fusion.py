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
