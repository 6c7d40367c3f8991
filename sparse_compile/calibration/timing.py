"""Time what a training step takes on this machine: the step of the model as it is, its blocks, and maps in their place.

Nothing here changes the model: no gradient is left behind, buffers and random generators are put back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparse_compile.calibration.blocks import Block
from sparse_compile.calibration.exits import AttentionPart
from sparse_compile.calibration.losses import loss_of
from sparse_compile.options.recipe import AffineMap
from sparse_compile.torch_private.modules import uncompiled

__all__ = [
    "STEP_FORWARDS",
    "Untimed",
    "attention_seconds",
    "block_seconds",
    "map_seconds",
    "median_seconds",
    "step_seconds",
]

_STEP_RUNS: Final = 3
_BLOCK_RUNS: Final = 9

STEP_FORWARDS: Final = 2 * (1 + _STEP_RUNS)
"""What `step_seconds` costs, in forwards: with frozen weights a step computes as much as two, and is counted so."""


class Untimed(ValueError):  # noqa: N818  (it names the finding)
    """Report that something cannot be timed, and why."""


def median_seconds(call: Callable[[], object], device: torch.device, runs: int, allowed: float = float("inf")) -> float:
    """Return how long a call takes: the median of several runs after one that is not counted.

    Args:
        call: What is timed; its work on the device is waited for.
        device: Where it works.
        runs: How often it is run at most.
        allowed: Seconds after which no further run begins; one is made in any case.
    """
    _wait(device, call())
    begin = time.perf_counter()
    taken: list[float] = []
    while not taken or (len(taken) < runs and time.perf_counter() - begin < allowed):
        start = time.perf_counter()
        _wait(device, call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def step_seconds(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return how long the forward and the backward of a batch take, run eagerly, in the mode that the model is in.

    Raises:
        Untimed: Nothing is trained, or `torch.autograd.grad`, which leaves no gradient behind, does not get there: the
            graphs of re-entrant checkpoints have leaves of their own.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    if not trained:
        raise Untimed("nothing of the model is trained")

    def step() -> None:
        gradients = torch.autograd.grad(loss_of(model(**batch)), trained, allow_unused=True)
        reached = sum(each is not None for each in gradients)
        if 2 * reached < len(trained):
            raise Untimed(f"gradients reach {reached} of {len(trained)} trained tensors (are checkpoints re-entrant?)")

    with _left_alone(model), torch.enable_grad():
        try:
            return median_seconds(step, trained[0].device, _STEP_RUNS)
        except RuntimeError as error:
            raise Untimed(f"its backward fails: {str(error).splitlines()[0]}") from error


def block_seconds(block: Block, x: Tensor, *, differentiated: bool, allowed: float) -> float:
    """Return how long a block takes for all tokens, forward and backward.

    Args:
        block: The block; gradients of its adapters are computed too.
        x: What it reads, (..., in).
        differentiated: Whether x gets a gradient.
        allowed: Seconds that may be spent.
    """
    x = x.detach().requires_grad_(differentiated)
    wanted = [x, *block.trained] if differentiated else block.trained

    def run() -> object:
        y = block(x)
        return torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True) if wanted else y

    with torch.enable_grad():
        return median_seconds(run, x.device, _BLOCK_RUNS, allowed)


def map_seconds(
    surrogate: AffineMap, x: Tensor, context: Tensor, dtype: torch.dtype, *, differentiated: bool, allowed: float
) -> float:
    """Return how long a map takes for context tokens, forward and backward, with their rows taken and put back.

    Both are written out: compiled code runs no autograd.

    Args:
        surrogate: The map.
        x: What the block reads, (..., in).
        context: Bool over the tokens, true at context tokens.
        dtype: Of what the block returns.
        differentiated: Whether x gets a gradient.
        allowed: Seconds that may be spent.
    """
    q, u, bias = (each.to(device=x.device, dtype=dtype) for each in (surrogate.q, surrogate.u, surrogate.bias))
    x = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    flat = context.reshape(-1)
    output_rows, context_rows = (mask.nonzero().flatten() for mask in (~flat, flat))
    output, gradient = x.new_zeros(len(output_rows), len(bias)), x.new_ones(len(flat), len(bias))

    def merged(of_output: Tensor, of_context: Tensor) -> Tensor:
        whole = x.new_empty(len(flat), of_context.shape[1])
        return whole.index_copy_(0, output_rows, of_output).index_copy_(0, context_rows, of_context)

    def run() -> object:
        of_output, of_context = x.index_select(0, output_rows), x.index_select(0, context_rows)
        y = merged(output, torch.addmm(bias, of_context @ q.mT, u.mT))
        if not differentiated:
            return y
        return merged(of_output, gradient.index_select(0, context_rows) @ u @ q)

    with torch.no_grad():
        return median_seconds(run, x.device, _BLOCK_RUNS, allowed)


def attention_seconds(part: AttentionPart, like: Tensor, context: Tensor, *, allowed: float) -> float:
    """Return how long attention takes for all queries, forward and backward.

    Args:
        part: The sizes of the block.
        like: An activation, for the device and dtype.
        context: Bool (B, S), for the sizes.
        allowed: Seconds that may be spent.
    """
    rows, length = context.shape
    query, key, value = (
        like.new_empty(rows, part.heads, length, width).normal_().requires_grad_(part.differentiated)
        for width in (part.head_dim, part.head_dim, part.value_head_dim)
    )

    def run() -> object:
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.autograd.grad(y, (query, key, value), torch.ones_like(y)) if part.differentiated else y

    with torch.enable_grad():
        return median_seconds(run, like.device, _BLOCK_RUNS, allowed)


def _wait(device: torch.device, _: object) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Run a model's own code, and put its buffers and the random generators back."""
    devices = {each.device.index for each in model.parameters() if each.device.type == "cuda"}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)))
        for module in model.modules():
            stack.enter_context(uncompiled(module))
        before = [(each, each.clone()) for each in model.buffers() if not each.is_meta]
        try:
            yield
        finally:
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
