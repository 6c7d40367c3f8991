"""Context tokens that leave the residual stream, by hooks on the unmodified eager model, at full dense cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ExitMap:
    """What a block behind the exit reads of context tokens: the stream of the exit, and U (Q x) + b added to it.

    Attributes:
        block: The block; its first argument is the residual stream.
        q: (r, in).
        u: (out, r).
        bias: (out,).
    """

    block: nn.Module
    q: Tensor
    u: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class ContextExit:
    """Have context tokens leave the residual stream before a block.

    What later blocks go on computing for them is read by nothing: the next block reads the exit's stream again, and
    the loss reads output tokens alone.

    Attributes:
        block: The block of the exit; its first argument is the residual stream.
        projection: A module that reads x, what that block's attention reads (its query projection, say).
        later: Every block behind it, in order.
        detached: Whether no gradient passes through the maps.
    """

    block: nn.Module
    projection: nn.Module
    later: Sequence[ExitMap]
    detached: bool = False


def exit_context(stack: ExitStack, site: ContextExit, output_mask: Tensor) -> None:
    """Hook a model; the hooks are removed with the stack."""
    kept: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[name] = args[0]

        return hook

    def replace(part: ExitMap) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = kept["x"].detach() if site.detached else kept["x"]
            seen = kept["stream"] + (x @ part.q.T) @ part.u.T + part.bias
            return torch.where(output_mask.reshape(*seen.shape[:-1], 1), args[0], seen), *args[1:]

        return hook

    stack.callback(site.block.register_forward_pre_hook(remember("stream")).remove)
    stack.callback(site.projection.register_forward_pre_hook(remember("x")).remove)
    for part in site.later:
        stack.callback(part.block.register_forward_pre_hook(replace(part)).remove)
