"""The search for a value does what an obvious loop of whole passes does, only faster."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.edit._search import divergence
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import Aim, Bystander, Search, Start, _chunks, optimise
from retouch.errors import FactError, ModelError
from retouch.tokens import Text, encode
from retouch.trace import Suffix

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("Answer the question: What is the mother tongue of {}?", "Danielle Darrieux", "Portuguese and Italian"),
    Fact("The currency of", "", "yen").of("The currency of Japan is the", "Japan", "franc"),
    Fact("{} is located in", "The great Big Ben", "Rome"),
]
CONTEXTS = [Context("", 0.5), Context("I am the one. ", 0.25), Context("Because. ", 0.25)]


class Slow:
    """The oracle: every row alone, unpadded, through the whole network, in float64; a plain hook adds the value."""

    def __init__(self, model, problem, block, side, method):
        self.network = copy.deepcopy(model.network).double()
        path = model.anatomy.path(f"blocks.{block}.mlp.down" if side == "down" else f"blocks.{block}")
        self.module = self.network.get_submodule(path)
        self.problem, self.method = problem, method
        self.seen = None
        none = torch.zeros(model.anatomy.d_model, dtype=torch.float64)
        with torch.no_grad():
            self._logp(problem.rows[0].ids, problem.anchors[0], none)
            self.initial = self.seen
            self.before = self._kl_row(none)

    def _logp(self, ids, anchor, delta):
        """Log-probabilities after every token, with the value added at one."""

        def add(module, args, out):
            state = out[0] if isinstance(out, tuple) else out
            shaped = state.reshape(1, len(ids), -1)
            self.seen = shaped[0, anchor].detach().clone()
            here = torch.zeros_like(shaped)
            here[0, anchor] = 1
            moved = (shaped + here * delta).reshape(state.shape)
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = self.module.register_forward_hook(add)
        try:
            return self.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    def _kl_row(self, delta):
        row = self.problem.kl
        at = len(row.ids) - 1 if self.method.kl_position == "last" else self.problem.kl_at
        return self._logp(row.ids, self.problem.kl_at, delta)[at]

    def _targets(self, delta):
        """Log-probabilities at every target token, and the token, for every row."""
        for row, anchor in zip(self.problem.rows, self.problem.anchors):
            logp = self._logp(row.ids, anchor, delta)
            yield [(logp[row.prompt + i], token) for i, token in enumerate(row.target)]

    def loss(self, delta):
        s = self.method
        rows = [-sum(logp[t] for logp, t in row) / len(row) for row in self._targets(delta)]
        kl = 0.0
        if s.kl_factor:
            now = self._kl_row(delta)
            kl = (now.exp() * (now - self.before)).sum()
        size, length = delta.norm(), self.initial.norm()
        decay = size / length**2 if s.weight_decay_form == "published" else (size / length) ** 2
        return sum(rows) / len(rows) + s.kl_factor * kl + s.weight_decay * decay

    @torch.no_grad()
    def margin(self, delta):
        leads = []
        for row in self._targets(delta.double()):
            for logp, token in row:
                others = torch.cat([logp[:token], logp[token + 1 :]])
                leads.append(float(logp[token] - others.max()))
        return min(leads)

    def run(self):
        """The loop of the papers: loss; stop; backward; step; shrink."""
        s = self.method
        delta = torch.zeros_like(self.initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=s.learning_rate)
        losses = []
        for step in range(s.n_steps):
            loss = self.loss(delta)
            losses.append(float(loss.detach()))
            if losses[-1] < s.stop_loss or step == s.n_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                longest = s.clamp * self.initial.norm()
                if delta.norm() > longest:
                    delta.mul_(longest / delta.norm())
        return delta.detach(), losses


def find(model, facts=FACTS, contexts=CONTEXTS, position="subject"):
    return problems(model, facts, contexts, position)


def close(one, two, tolerance=1e-4):
    return torch.allclose(one.double(), two.double(), atol=tolerance, rtol=tolerance)


# Against the oracle.


@pytest.mark.parametrize(
    ("family", "side", "kl_position"),
    [
        ("llama", "down", "subject"),
        ("llama", "residual", "last"),
        ("gpt2", "down", "last"),
        ("gpt_neox", "down", "subject"),
        ("opt", "down", "subject"),
        ("gemma2", "residual", "subject"),
        ("gemma2", "down", "last"),
        ("gptj", "residual", "subject"),
    ],
)
def test_the_search_is_the_slow_loop(open_tiny, family, side, kl_position):
    model = open_tiny(family)
    method = Rome(n_steps=4, learning_rate=0.2, kl_factor=1.0, kl_position=kl_position, clamp=1.5)
    for problem, value in zip(found := find(model), optimise(model, found, 1, side, method)):
        slow = Slow(model, problem, 1, side, method)
        delta, losses = slow.run()
        assert close(value.initial, slow.initial)
        assert value.losses == pytest.approx(losses, abs=1e-4)
        assert close(value.delta, delta, 2e-3)
        assert value.margin == pytest.approx(slow.margin(value.delta), abs=1e-3)


def test_a_value_at_the_prompts_end_is_the_slow_loop_too(llama):
    method = Rome(n_steps=3, kl_factor=0.5, learning_rate=0.2)
    for problem, value in zip(found := find(llama, position="prompt"), optimise(llama, found, 1, "down", method)):
        assert problem.anchors == [row.prompt for row in problem.rows]
        delta, losses = Slow(llama, problem, 1, "down", method).run()
        assert value.losses == pytest.approx(losses, abs=1e-4)
        assert close(value.delta, delta, 2e-3)


@pytest.mark.parametrize("form", ["published", "relative"])
def test_the_gradient_is_the_finite_differences(open_tiny, form):
    model = open_tiny("gpt2")  # llama's norms compute in float32 even in a float64 network
    method = Rome(kl_factor=1.0, weight_decay_form=form)
    found = find(model)[:2]
    search = Search(model, found, 1, "down", method)
    make = torch.Generator().manual_seed(0)
    delta = (0.3 * torch.randn(2, 32, generator=make)).requires_grad_(True)
    nll, kl, *_ = search.terms(delta)
    (gradient,) = torch.autograd.grad((nll + method.kl_factor * kl).sum(), delta)
    still = Rome(kl_factor=1.0, weight_decay=0.0)
    for i, problem in enumerate(found):
        slow = Slow(model, problem, 1, "down", still)
        for _ in range(3):
            way = torch.randn(32, generator=make, dtype=torch.float64)
            here = delta[i].detach().double()
            with torch.no_grad():
                slope = (slow.loss(here + 1e-5 * way) - slow.loss(here - 1e-5 * way)) / 2e-5
            assert float(gradient[i].double() @ way) == pytest.approx(float(slope), rel=1e-3, abs=1e-4)


# Steps, clamp, stops.


def test_n_steps_make_one_update_less(llama):
    found = find(llama)
    (still, *_) = optimise(llama, found, 1, "down", Rome(n_steps=1))
    assert len(still.losses) == 1 and not still.delta.any()
    for value in optimise(llama, found, 1, "down", Rome(n_steps=2, clamp=100.0, learning_rate=0.1)):
        assert len(value.losses) == 2
        assert close(value.delta.abs(), torch.full((32,), 0.1), 1e-3)  # Adam's first step has one size everywhere


@settings(max_examples=8, deadline=None)
@given(clamp=st.floats(0.01, 3), learning_rate=st.floats(0.05, 5), n_steps=st.integers(2, 5))
def test_a_value_is_never_longer_than_the_clamp(open_tiny, clamp, learning_rate, n_steps):
    model = open_tiny("llama")
    method = Rome(clamp=clamp, learning_rate=learning_rate, n_steps=n_steps)
    for value in optimise(model, find(model)[:2], 1, "residual", method):
        assert value.delta.norm() <= clamp * value.initial.norm() * (1 + 1e-5)


def _staggered(model, **more):
    """Settings under which the facts stop at different steps."""
    method = Rome(n_steps=14, clamp=3.0, **more)
    lasts = [v.losses for v in optimise(model, find(model), 1, "residual", Rome(n_steps=14, clamp=3.0, stop_loss=0.0))]
    return Rome(n_steps=14, clamp=3.0, stop_loss=max(min(losses) for losses in lasts) + 0.05, **more), method


def test_many_facts_together_are_each_fact_alone(llama):
    method, _ = _staggered(llama)
    found = find(llama)
    together = optimise(llama, found, 1, "residual", method)
    assert len({len(v.losses) for v in together}) > 1  # they do stop at different steps
    for problem, value in zip(found, together):
        (alone,) = optimise(llama, [problem], 1, "residual", method)
        assert len(alone.losses) == len(value.losses)
        assert value.losses == pytest.approx(alone.losses, abs=1e-3)
        assert close(value.delta, alone.delta, 5e-3)
        assert value.reached == alone.reached


@pytest.mark.parametrize("clamp", [0.3, 3.0])
def test_a_fact_that_is_done_stays_bit_for_bit(llama, clamp):
    found = find(llama)
    free = optimise(llama, found, 1, "residual", Rome(n_steps=12, clamp=clamp, stop_loss=0.0))
    stop = sorted(min(v.losses) for v in free)[1] + 1e-3  # two facts reach it, two never do
    values = {
        n: optimise(llama, found, 1, "residual", Rome(n_steps=n, clamp=clamp, stop_loss=stop)) for n in (12, 11, 9, 7)
    }
    done = [i for i, v in enumerate(values[12]) if v.losses[-1] < stop]
    assert 0 < len(done) < len(found)
    assert min(len(values[12][i].losses) for i in done) < 10  # others go on for a while
    for i in done:
        at = len(values[12][i].losses)
        for n in (n for n in values if n >= at):
            assert torch.equal(values[n][i].delta, values[12][i].delta)
            assert values[n][i].losses == values[12][i].losses


def test_stop_at_argmax_ends_when_the_target_leads_everywhere(llama):
    easy = [Fact("The capital of {} is", "France", target) for target in ("the", "a")]
    found = find(llama, [*easy, FACTS[1]], position="prompt")
    method = Rome(stop="argmax", min_margin=0.5, n_steps=15, clamp=60.0, kl_factor=0.0, weight_decay=0.0)
    values = optimise(llama, found, 2, "residual", method)
    stopped = [(p, v) for p, v in zip(found, values) if len(v.losses) < method.n_steps]
    assert 0 < len(stopped) < len(found)
    for problem, value in zip(found, values):
        margin = Slow(llama, problem, 2, "residual", method).margin(value.delta)
        assert value.margin == pytest.approx(margin, abs=1e-2)
        assert value.reached == (margin > 0)
    assert all(v.margin >= 0.5 for _, v in stopped)


@pytest.mark.parametrize("form", ["published", "relative"])
def test_the_forms_of_weight_decay(llama, form):
    found = find(llama)[:2]
    # at the start the decay has no slope, so that the first update is the same with and without it
    fields = {"n_steps": 2, "kl_factor": 0.0, "clamp": 100.0, "weight_decay_form": form}
    without = optimise(llama, found, 1, "down", Rome(**fields, weight_decay=0.0))
    for free, held in zip(without, optimise(llama, found, 1, "down", Rome(**fields, weight_decay=0.25))):
        assert torch.equal(free.delta, held.delta)
        size, length = float(held.delta.norm()), float(held.initial.norm())
        wanted = size / length**2 if form == "published" else (size / length) ** 2
        assert held.losses[1] - free.losses[1] == pytest.approx(0.25 * wanted, rel=1e-3)


def test_the_divergence_has_the_edited_distribution_in_front():
    edited, original = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    found = float(divergence(edited.log(), original.log()))
    assert found == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert float(divergence(original.log(), edited.log())) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert float(divergence(edited.log(), edited.log())) == 0


def test_a_search_that_explodes_says_so(llama):
    method = Rome(learning_rate=1e10, clamp=1e30, weight_decay=1e30, weight_decay_form="relative")
    with pytest.raises(ModelError, match="not finite"):
        optimise(llama, find(llama), 1, "down", method)


def test_a_search_leaves_no_hook_and_no_gradient(llama):
    optimise(llama, find(llama), 1, "down", Rome(n_steps=2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.network.modules())
    assert all(p.grad is None for p in llama.network.parameters())


def test_chunks_hold_every_fact_once_and_a_small_budget_changes_nothing(llama, monkeypatch):
    found = find(llama)
    own, order = [[i] for i in range(4)], [2, 0, 3, 1]
    assert [g for chunk in _chunks(llama, found, own, order, 1, 0, {}) for g in chunk] == order
    assert len(_chunks(llama, found, own, order, 1, 0, {})) == 4
    assert len(_chunks(llama, found, own, order, 1, 512, {})) == 1
    together = optimise(llama, found, 1, "down", Rome(n_steps=3))
    monkeypatch.setattr("retouch.edit.value._chunks", lambda *_: [[g] for g in order])
    for one, two in zip(together, optimise(llama, found, 1, "down", Rome(n_steps=3))):
        assert one.losses == pytest.approx(two.losses, abs=1e-4)


# One value for several facts.


SAME = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("The capital of {} was", "France", "the port"),  # shares its rows up to the subject with the first
    Fact("Everybody in {} speaks", "France", "Dutch"),
]


class SlowGroup:
    """The oracle for facts that share a value: `Slow` for each, added up as the formula says."""

    def __init__(self, model, members, block, side, method, start=None, reach=1.0, pull=0.0, temperature=None):
        self.slows = [Slow(model, p, block, side, method) for p in members]
        first = {p.rows[0].ids[: p.anchors[0] + 1]: s.initial for p, s in zip(members, self.slows)}
        self.initial = sum(first.values()) / len(first)
        self.guards = list({s.problem.kl.ids: s for s in self.slows}.values())
        self.method, self.reach, self.pull, self.temperature = method, reach, pull, temperature
        self.start = torch.zeros(32).double() if start is None else start.double()

    def loss(self, delta):
        s = self.method
        nlls = []
        for slow in self.slows:
            rows = [-sum(logp[t] for logp, t in row) / len(row) for row in slow._targets(delta)]
            nlls.append(sum(rows) / len(rows))
        nlls = torch.stack(nlls)
        share = torch.full_like(nlls, 1 / len(nlls))
        if self.temperature is not None:
            share = (nlls.detach() / self.temperature).softmax(0)
        nows = [(g._kl_row(delta), g.before) for g in self.guards]
        kl = sum((now.exp() * (now - before)).sum() for now, before in nows) / len(nows)
        length = self.initial.norm()
        held = self.pull * ((delta - self.start).norm() / length) ** 2
        return (share * nlls).sum() + s.kl_factor * kl + s.weight_decay * delta.norm() / length**2 + held

    def run(self):
        delta = self.start.clone().requires_grad_(True)
        adam = torch.optim.Adam([delta], lr=self.method.learning_rate)
        losses = []
        for step in range(self.method.n_steps):
            loss = self.loss(delta)
            losses.append(float(loss.detach()))
            if step == self.method.n_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                longest = self.method.clamp * self.reach * self.initial.norm()
                delta.mul_((longest / delta.norm()).clamp(max=1))
        return delta.detach(), losses


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("side", ["down", "residual"])
def test_one_value_for_several_facts_is_the_slow_sum(llama, side, temperature):
    method = Rome(n_steps=4, learning_rate=0.2, kl_factor=0.5, clamp=1.5, weight_decay=0.1, stop_loss=0.0)
    found = find(llama, [*SAME, FACTS[1]])
    groups = [[0, 1, 2], [3]]
    values = optimise(llama, found, 1, side, method, groups=groups, temperature=temperature)
    for group, value in zip(groups, values, strict=True):
        slow = SlowGroup(llama, [found[i] for i in group], 1, side, method, temperature=temperature)
        delta, losses = slow.run()
        assert close(value.initial, slow.initial)
        assert value.losses == pytest.approx(losses, abs=1e-4)
        assert close(value.delta, delta, 2e-3)
        margins = [s.margin(value.delta) for s in slow.slows]
        assert value.margin == pytest.approx(min(margins), abs=1e-3)


def test_a_start_is_held_by_its_pull_and_given_its_reach(llama):
    method = Rome(n_steps=5, learning_rate=0.5, kl_factor=0.5, clamp=0.8, weight_decay=0.1, stop_loss=0.0)
    found = find(llama, [*SAME, FACTS[1]])
    begin = 0.3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    start, groups = Start(begin, torch.tensor([3.0**0.5, 1.0]), 2.0), [[0, 1, 2], [3]]
    values = optimise(llama, found, 1, "down", method, groups=groups, start=start)
    for i, (group, value) in enumerate(zip(groups, values, strict=True)):
        members, reach = [found[j] for j in group], float(start.reach[i])
        slow = SlowGroup(llama, members, 1, "down", method, begin[i], reach, start.pull)
        delta, losses = slow.run()
        assert value.losses == pytest.approx(losses, abs=1e-4)
        assert close(value.delta, delta, 2e-3)
        assert value.delta.norm() <= 0.8 * reach * value.initial.norm() * (1 + 1e-5)


def test_a_start_is_no_longer_than_the_clamp_even_without_a_step(llama):
    method = Rome(n_steps=1, clamp=0.8)
    begin = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[100.0], [1e-3]])
    reach = torch.tensor([2.0, 1.0])
    long, short = optimise(llama, find(llama)[:2], 1, "down", method, start=Start(begin, reach))
    assert float(long.delta.norm()) == pytest.approx(0.8 * 2 * float(long.initial.norm()), rel=1e-5)
    assert torch.equal(short.delta, begin[1])


def test_a_group_does_not_see_how_badly_another_one_fares(llama):
    found = find(llama, [*SAME, FACTS[1], FACTS[3]])
    search = Search(llama, found, 1, "down", Rome(), groups=[[0, 1, 2], [3, 4]])
    nll = torch.tensor([1.0, 2.0, 3.0, 400.0, 401.0])
    share = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    wanted = [float(share @ nll[:3]), 400 + float(torch.tensor(1.0).sigmoid())]
    assert search.per_group(nll, 1.0).tolist() == pytest.approx(wanted)
    assert search.per_group(nll, 1e-3).tolist() == pytest.approx([3.0, 401.0])  # the hardest fact alone
    assert search.per_group(nll).tolist() == pytest.approx([2.0, 400.5])


# Aims.


@torch.no_grad()
def states_at_end(slow, block, model):
    """Each row's state after a block at the prompt's last token; the value of `delta` is added on the way."""
    seen = []
    path = model.anatomy.path(f"blocks.{block}")

    def keep(_, __, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    def run(delta):
        seen.clear()
        handle = slow.network.get_submodule(path).register_forward_hook(keep)
        try:
            for row, anchor in zip(slow.problem.rows, slow.problem.anchors):
                slow._logp(row.ids[: row.prompt + 1], anchor, delta.double())
        finally:
            handle.remove()
        return torch.stack([s.reshape(-1, 32)[-1] for s in seen])

    return run


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_aim_is_the_distance_of_whole_passes(open_tiny, family, scale):
    model = open_tiny(family)
    found = find(model)
    make = torch.Generator().manual_seed(0)
    aim = Aim(2, torch.randn(4, 32, generator=make), 0.0, scale=scale)
    search = Search(model, found, 1, "down", Rome(), aim=aim)
    delta = 0.3 * torch.randn(4, 32, generator=make)
    with torch.no_grad():
        measured = search.terms(delta).distance
    for i, problem in enumerate(found):
        states = states_at_end(Slow(model, problem, 1, "down", Rome()), 2, model)
        before = states(torch.zeros(32))
        away = (states(delta[i]) - before - aim.gains[i].double()).norm(dim=1)
        wanted = (away / before.norm(dim=1)).mean() if scale is None else scale * away[0]
        assert float(measured[i]) == pytest.approx(float(wanted), rel=1e-3)


def test_a_value_with_an_aim_comes_nearer_and_says_how_near(llama):
    found = find(llama)
    gains = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    method = Rome(n_steps=25, weight_decay=0.0, learning_rate=0.3)
    values = optimise(llama, found, 1, "down", method, aim=Aim(2, gains, 0.0))
    for i, (problem, value) in enumerate(zip(found, values)):
        states = states_at_end(Slow(llama, problem, 1, "down", method), 2, llama)
        before = states(torch.zeros(32))

        def distance(delta, i=i, states=states, before=before):
            return float(((states(delta) - before - gains[i].double()).norm(dim=1) / before.norm(dim=1)).mean())

        assert value.distance == pytest.approx((distance(torch.zeros(32)), distance(value.delta)), rel=1e-3)
        assert value.distance[1] < value.distance[0]
        assert (value.margin, value.reached) == (0.0, False)  # nobody asked for the targets


def test_an_aim_and_a_limit_on_drift_hold_together(llama):
    found = find(llama)[:2]
    gains = 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    rows = encode(llama.tokenizer, [Text("The capital of Japan is"), Text("Big Ben is in")])
    heard = [Bystander(i, row, torch.linspace(0, 1, len(row.ids))) for i, row in enumerate(rows)]
    aim = Aim(2, gains, 0.0)

    def sought(limit):
        method = Rome(n_steps=20, max_drift=limit, learning_rate=0.3)
        values = optimise(llama, found, 1, "down", method, aim=aim, bystanders=heard)
        with torch.no_grad():
            return values, Search(llama, found, 1, "down", method, bystanders=heard).terms(
                torch.stack([v.delta for v in values])
            ).drift

    free, drift = sought(1e6)
    assert [v.drift for v in free] == pytest.approx(drift.tolist(), rel=1e-3)
    limit = 0.1 * float(drift.min())
    held, drift = sought(limit)
    assert float(drift.max()) <= limit * (1 + 1e-3)
    for loose, tight in zip(free, held):
        assert loose.distance[1] < tight.distance[1] <= tight.distance[0]


# The path of a value: after the block where nothing stands between, else through the MLP's last weight.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "qwen3", "phi3"])
def test_starting_after_the_block_is_starting_inside_it(open_tiny, family):
    model = open_tiny(family)
    found = find(model)
    rows = encode(model.tokenizer, [Text("The capital of Japan is")])
    heard = [Bystander(0, rows[0], torch.linspace(-1, 1, len(rows[0].ids)))]
    delta = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for bystanders in ((), heard):
        search = Search(model, found, 1, "down", Rome(max_drift=1.0), bystanders=bystanders)
        assert not search.through_down and search.suffix.first == 2
        short = search.terms(delta)
        lines = search.lines
        search.whole = Suffix.of(model, [line.ids for line in lines], [line.anchor for line in lines], 1)
        search.row_of, search.through_down = list(range(len(lines))), True
        search.pack(range(len(lines)))
        for one, two in zip(short, search.terms(delta)):
            assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_behind_the_mlp_is_never_left_out(open_tiny, family):
    search = Search(open_tiny(family), find(open_tiny(family)), 1, "down", Rome())
    assert search.through_down and search.suffix.first == 1


# Rows.


START = Fact("{} is the capital of", "A", "France")


def test_a_subject_that_opens_the_prompt_leaves_the_bare_row_out_and_says_so(llama):
    (problem,) = find(llama, [START])
    assert len(problem.rows) == 2 and all(a > 0 for a in problem.anchors)
    assert problem.weights == pytest.approx((0.5, 0.5))
    assert problem.kl.subject > 0
    (note,) = problem.notes
    assert "attention sink" in note and "bos='always'" in note


def test_a_subject_that_opens_the_only_row_is_edited_there_and_says_so(llama):
    (problem,) = find(llama, [START], CONTEXTS[:1])
    assert problem.anchors == [0]
    (note,) = problem.notes
    assert "reaches every text without a beginning-of-text token" in note


def test_a_tokenizer_with_a_beginning_of_text_keeps_the_bare_row(open_tiny):
    (problem,) = find(open_tiny("gemma2"), [START])
    assert len(problem.rows) == 3 and not problem.notes


def test_without_a_subject_only_the_prompts_end_can_be_written(llama):
    bare = Fact("The currency of Japan is the", "", "franc")
    with pytest.raises(FactError, match="has no subject"):
        find(llama, [bare])
    (problem,) = find(llama, [bare], position="prompt")
    assert problem.kl is None
    (value,) = optimise(llama, [problem], 1, "down", Rome(n_steps=3))
    assert value.losses[-1] < value.losses[0]
