"""PMET searches two values at once, writes one, and divides by roots."""

from __future__ import annotations

import copy

import pytest
import torch
from spread_oracle import APART, OWN, close, covariance, down, found_for, mean_key, seen, written

from retouch.edit.facts import Fact
from retouch.edit.pmet import Pmet
from retouch.edit.value import Settled, optimise

N_BLOCKS = 4
QUICK = {"n_steps": 4, "contexts": OWN, "n_tokens": 400}


class Slow:
    """Both values added by plain hooks, every row alone and unpadded, in float64."""

    def __init__(self, model, problem, block, method):
        self.network = copy.deepcopy(model.network).double()
        self.paths = [model.anatomy.path(f"blocks.{block}.{part}") for part in ("mlp.down", "attention.out")]
        self.problem, self.method, self.states = problem, method, {}
        none = torch.zeros(2, 32, dtype=torch.float64)
        with torch.no_grad():
            self._logp(problem.rows[0].ids, problem.anchors[0], none)
            self.initial = torch.stack([self.states[path] for path in self.paths])
            self.before = self._logp(problem.kl.ids, problem.kl_at, none)[problem.kl_at]

    def _logp(self, ids, anchor, deltas):
        def hook(path, delta):
            def add(_, args, out):
                shaped = out.reshape(1, len(ids), -1).clone()
                self.states[path] = shaped[0, anchor].detach().clone()
                here = torch.zeros_like(shaped)
                here[0, anchor] = 1
                return (shaped + here * delta).reshape(out.shape)

            return self.network.get_submodule(path).register_forward_hook(add)

        handles = [hook(path, delta) for path, delta in zip(self.paths, deltas)]
        try:
            return self.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    def run(self):
        s, p = self.method, self.problem
        deltas = torch.zeros(2, 32, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([deltas], lr=s.learning_rate)
        losses = []
        for step in range(s.n_steps):
            rows = [
                self._logp(r.ids, a, deltas)[r.prompt : r.prompt + len(r.target)] for r, a in zip(p.rows, p.anchors)
            ]
            nll = torch.stack([-x[range(len(x)), r.target].mean() for x, r in zip(rows, p.rows)]).mean()
            said = all((x.argmax(1) == torch.tensor(r.target)).all() for x, r in zip(rows, p.rows))
            now = self._logp(p.kl.ids, p.kl_at, deltas)[p.kl_at]
            kl = s.kl_factor * (now.exp() * (now - self.before)).sum()
            decay = s.weight_decay * deltas.norm() / self.initial.norm() ** 2
            loss = (s.said_weight if said else 1) * nll + kl + decay
            losses.append(float(loss.detach()))
            if (said and kl <= s.stop_drift) or step == s.n_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                deltas *= (s.clamp * self.initial.norm(dim=1) / deltas.norm(dim=1)).clamp(max=1)[:, None]
        return deltas.detach(), losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "gemma2"])
def test_the_search_for_two_values_is_the_slow_loop(open_tiny, family):
    model, method = open_tiny(family), Pmet(**QUICK)
    found = found_for(model, APART)
    settled = Settled(method.said_weight, method.stop_drift)
    for problem, value in zip(found, optimise(model, found, 1, "both", method, settled=settled)):
        slow = Slow(model, problem, 1, method)
        deltas, losses = slow.run()
        close(value.initial, slow.initial.flatten(), 1e-4)
        assert value.losses == pytest.approx(losses, abs=1e-3)
        close(value.delta, deltas.flatten(), 5e-3)


def test_a_target_that_leads_is_let_go_and_ends_the_search(llama):
    method = Pmet(
        **QUICK | {"n_steps": 40, "clamp": 200.0, "kl_factor": 0.01, "stop_drift": 100.0},
        learning_rate=0.5,
        weight_decay=0.0,
    )
    found = found_for(llama, [Fact("Everybody in {}", "France", target) for target in ("the", "a", "in")])
    values = optimise(llama, found, 3, "both", method, settled=Settled(0.1, 100.0))
    ended = [(p, v) for p, v in zip(found, values) if v.reached]
    assert ended
    for problem, value in ended:
        assert len(value.losses) < method.n_steps
        assert value.losses == pytest.approx(Slow(llama, problem, 3, method).run()[1], rel=1e-2, abs=1e-3)
        assert value.losses[-1] < 0.5 * value.losses[-2]  # a tenth of the target's loss is left


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_block_takes_the_residual_of_the_weights_output_over_a_root(open_tiny, family):
    model, method, blocks = open_tiny(family), Pmet(**QUICK, blocks=(0, 1, 3)), (0, 1, 3)
    found = found_for(model, APART)
    values = method.values(model, found, [[0], [1], [2]], 3)
    change, work = method.plan(model, APART), model
    for j, block in enumerate(blocks):
        k = torch.stack([mean_key(work, found, [i], block) for i in range(3)], 1)
        out = [seen(work, p.rows[0].ids[: p.anchors[0] + 1], model.anatomy.path(down(3)), "output") for p in found]
        r = torch.stack([v.target.double() - o for v, o in zip(values, out)], 1) / (3 - j) ** 0.5
        delta = r @ k.T @ torch.linalg.inv(model.anatomy.d_ff * covariance(model, block) + k @ k.T)
        close(change.parts[down(block)].delta(), delta, 2e-3)
        work = written(work, block, delta)


def test_only_the_mlps_value_is_written_and_the_last_blocks_weight_gives_it(llama):
    method = Pmet(**QUICK, blocks=(2,), metric="identity", moment_weight=1e-6)
    found = found_for(llama, APART[:1])
    (value,) = method.values(llama, found, [[0]], 2)
    assert value.delta.shape == value.initial.shape == (32,)
    change = method.plan(llama, APART[:1])
    key = change.keys[down(2)][:, 0].double()
    ids = found[0].rows[0].ids[: found[0].anchors[0] + 1]
    bare = seen(llama, ids, llama.anatomy.path(down(2)), "output")
    close(change.parts[down(2)].delta() @ key, value.target.double() - bare, 1e-3)
    assert change.notes["facts"][0]["ratio"] == pytest.approx(float(value.delta.norm() / value.initial.norm()))
