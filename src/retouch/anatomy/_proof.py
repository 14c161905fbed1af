"""Prove on a dummy batch that an anatomy fits a network: paths, shapes, what flows where, the effect of writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

    from . import Anatomy

__all__ = ["prove"]

_TOLERANCE = 1e-4
"""How far the replayed head may be from the network's own logits, relative to the largest one (at least 1)."""


def prove(anatomy: Anatomy, network: torch.nn.Module, ids: torch.Tensor) -> None:
    """Check that the anatomy tells the truth about this network; the network is left as it was.

    Every named module exists and every matrix has its stated axes; blocks and ``mlp.down`` carry the stated widths;
    the steps after the last block give the network's own output; a vector added at ``mlp.down`` of a middle block
    changes that output; attention feeds the MLP of its block unless the two are parallel.

    Shapes: `ids` (batch, tokens).

    Args:
        anatomy: What `describe` said, given the same network.
        network: The network to look at.
        ids: Any token ids that the network accepts.

    Raises:
        ModelError: Naming the family, the path, what was expected and what was got.
    """
    import torch

    with torch.no_grad(), _evaluating(network):
        _prove_modules(anatomy, network)
        _prove_weights(anatomy, network)
        output, seen = _observe(anatomy, network, ids)
        _prove_flow(anatomy, seen, ids)
        _prove_head(anatomy, network, output, seen)
        _prove_writing(anatomy, network, ids, output, seen)


def _prove_modules(anatomy: Anatomy, network: torch.nn.Module) -> None:
    inner = [f"blocks.{i}{part}" for i in range(anatomy.n_blocks) for part in ["", *(f".{p}" for p in anatomy.parts)]]
    outer = [name for name in ("embed", "final_norm", "head") if name in anatomy.places]
    optional = {step[:-1] for step in anatomy.steps if step.endswith("?")}
    paths = [*(anatomy.path(name) for name in [*outer, *inner]), *anatomy.steps]
    for path in [path for path in paths if path.removesuffix("?") not in optional]:
        try:
            network.get_submodule(path)
        except AttributeError as error:
            _fail(anatomy, path, "a module", f"nothing ({error})")
    blocks = network.get_submodule(anatomy.places["blocks"])
    n_blocks = sum(1 for _ in blocks.children())
    if n_blocks != anatomy.n_blocks:
        _fail(anatomy, anatomy.places["blocks"], f"{anatomy.n_blocks} blocks", f"{n_blocks}")


def _prove_weights(anatomy: Anatomy, network: torch.nn.Module) -> None:
    for name in anatomy.names():
        path, expected = anatomy.weight(name), anatomy.shape(name)
        axes = "(out, in)"
        if anatomy.transposed(name):
            expected, axes = expected[::-1], "(in, out)"
        try:
            shape = tuple(network.get_parameter(path).shape)
        except AttributeError as error:
            _fail(anatomy, path, "a parameter", f"nothing ({error})")
        if shape != expected:
            _fail(anatomy, path, f"{name} stored {axes} as {expected}", f"{shape}")
        _prove_axes(anatomy, network, name)


def _prove_axes(anatomy: Anatomy, network: torch.nn.Module, name: str) -> None:
    """Of a square matrix the shape says nothing: multiply by it and compare."""
    import torch

    if name in ("embed", "head") or len(set(anatomy.shape(name))) == 2:
        return
    module, path = network.get_submodule(anatomy.path(name)), anatomy.weight(name)
    weight = network.get_parameter(path)
    key = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
    zero = torch.zeros_like(key)
    got = (module(key) - module(zero)).float()  # the difference is free of the bias
    stated = (key @ weight if anatomy.transposed(name) else key @ weight.T).float()
    other = (key @ weight.T if anatomy.transposed(name) else key @ weight).float()
    if (got - stated).norm() > (got - other).norm():
        _fail(anatomy, path, "(in, out)" if anatomy.transposed(name) else "(out, in)", "the other orientation")


def _observe(
    anatomy: Anatomy, network: torch.nn.Module, ids: torch.Tensor, nudge: str = "", amount: float = 0.0
) -> tuple[Any, dict[str, Any]]:
    """Run the batch; return the output, each block's output and each ``mlp.down``'s input by our name."""
    import torch

    seen: dict[str, Any] = {}
    ids = ids.to(network.get_parameter(anatomy.weight("embed")).device)
    with ExitStack() as hooks:
        for i in range(anatomy.n_blocks):
            block, down = f"blocks.{i}", f"blocks.{i}.mlp.down"
            module = network.get_submodule(anatomy.path(block))
            hooks.enter_context(module.register_forward_hook(_keep_output(seen, block)))
            module = network.get_submodule(anatomy.path(down))
            hooks.enter_context(module.register_forward_pre_hook(_keep_input(seen, down)))
        if nudge:
            module = network.get_submodule(anatomy.path(nudge))
            hooks.enter_context(module.register_forward_hook(_add_ramp(amount)))
        try:
            output = network(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(
                f"Family {anatomy.family!r}: a dummy batch of token ids does not pass through "
                f"{type(network).__name__}. {reason}"
            ) from error
    return output, seen


def _keep_output(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_input(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any) -> None:
        seen[name] = args[0]

    return hook


def _add_ramp(amount: float) -> Callable[..., Any]:
    import torch

    def hook(module: Any, args: Any, output: Any) -> Any:
        # A ramp and not a constant: a LayerNorm takes constants away.
        return output + amount * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device)

    return hook


def _prove_flow(anatomy: Anatomy, seen: dict[str, Any], ids: torch.Tensor) -> None:
    batch, tokens = ids.shape
    for i in range(anatomy.n_blocks):
        for name, width in ((f"blocks.{i}", anatomy.d_model), (f"blocks.{i}.mlp.down", anatomy.d_ff)):
            flat = anatomy.flat_mlp and name.endswith(".mlp.down")
            expected = (batch * tokens, width) if flat else (batch, tokens, width)
            what = "output" if name == f"blocks.{i}" else "input"
            if name not in seen:
                _fail(anatomy, anatomy.path(name), f"{what} {expected}", "no call in a forward pass")
            got = tuple(getattr(seen[name], "shape", ())) or type(seen[name]).__name__
            if got != expected:
                _fail(anatomy, anatomy.path(name), f"{what} {expected}", f"{got}")


def _prove_head(anatomy: Anatomy, network: torch.nn.Module, output: Any, seen: dict[str, Any]) -> None:
    own = output[0]
    if not anatomy.has_head and own.ndim == 3 and own.shape[-1] == anatomy.vocab_size != anatomy.d_model:
        _fail(anatomy, "head", "a head at the path of the table, since this network returns logits", "no such module")
    if not anatomy.has_head and "last_hidden_state" not in output:
        return  # a classifier's own output is not ours to replay
    steps = " -> ".join(anatomy.steps) or "the last block"
    replayed = anatomy.read_out(network, seen[f"blocks.{anatomy.n_blocks - 1}"])
    if replayed.shape != own.shape:
        _fail(anatomy, steps, f"output {tuple(own.shape)}", f"{tuple(replayed.shape)}")
    if _distance(replayed, own) > _TOLERANCE:
        _fail(
            anatomy,
            steps,
            f"the network's own output to {_TOLERANCE:g}",
            f"a distance of {_distance(replayed, own):.2g}",
        )


def _prove_writing(
    anatomy: Anatomy, network: torch.nn.Module, ids: torch.Tensor, output: Any, seen: dict[str, Any]
) -> None:
    middle = f"blocks.{anatomy.n_blocks // 2}"
    amount = 1.0 + float(seen[middle].float().abs().mean())  # large enough to be seen in half precision
    down, attention = f"{middle}.mlp.down", f"{middle}.attention.out"
    written, _ = _observe(anatomy, network, ids, down, amount)
    if not _distance(written[0], output[0]) > _TOLERANCE / 10:
        _fail(anatomy, anatomy.path(down), "a vector added to its output to change the network's output", "no change")
    _, nudged = _observe(anatomy, network, ids, attention, amount)
    feeds = _distance(nudged[down], seen[down]) > _TOLERANCE / 10
    if feeds == anatomy.parallel:
        expected = "parallel to the MLP" if anatomy.parallel else "feeding the MLP of its block"
        _fail(anatomy, anatomy.path(attention), f"attention {expected}", "the opposite")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = max(1.0, float(b.float().abs().max()))
    return float((a.float() - b.float()).abs().max()) / scale


@contextmanager
def _evaluating(network: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fail(anatomy: Anatomy, path: str, expected: str, got: str) -> NoReturn:
    raise ModelError(
        f"The table of family {anatomy.family!r} does not fit this model. At {path}: expected {expected}; got {got}. "
        f"Correct {anatomy.table}, or the model's configuration."
    )
