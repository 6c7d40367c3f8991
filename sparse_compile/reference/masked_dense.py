"""Sparsity as masks on the unmodified eager model, by hooks, at full dense cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.reference.context_exit import ContextExit, exit_context
from sparse_compile.reference.criteria import expand_kv_channels


@dataclass(frozen=True, eq=False)
class MaskedFFN:
    """Sparsify one FFN block by masking what its whole out-projection reads, adapter included.

    So an adapter on gate or up acts inside the intermediate, and an adapter on down reads the masked one.

    Attributes:
        out_projection: The out-projection as the model calls it (PEFT's wrapper, where there is one).
        kept: Int64 (k,), the intermediate channels that context tokens keep.
    """

    out_projection: nn.Module
    kept: Tensor


@dataclass(frozen=True, eq=False)
class MappedFFN:
    """Put an affine map in the place of one FFN block, for context tokens: y = U (Q x) + b.

    Adapters on gate, up and down are part of the block, so context tokens see nothing of them.

    Attributes:
        in_projection: A module that reads the block's input x as its first argument (gate, say).
        out_projection: The module that returns the block's output (down).
        q: (r, in).
        u: (out, r).
        bias: (out,).
        detached: Whether no gradient passes through the map.
    """

    in_projection: nn.Module
    out_projection: nn.Module
    q: Tensor
    u: Tensor
    bias: Tensor
    detached: bool = False


@dataclass(frozen=True, eq=False)
class MaskedAttention:
    """Sparsify one attention block by masking the base outputs of q, k, v and the base input of o.

    Modules that wrap a `base_layer` (PEFT's LoRA layers) are unwrapped: adapters stay dense. DoRA's scale of a channel
    multiplies the masked base output and the dense branch.

    Attributes:
        q: Query projection, output n_kv * groups * head_dim wide.
        k: Key projection, output n_kv * head_dim wide.
        v: Value projection, as wide as k.
        o: Output projection, its input as wide as q's output.
        kept_qk: Int64, the kv channels that context tokens keep in q and k.
        kept_vo: Int64, the kv channels that context tokens keep in v and in o's input.
        head_dim: Channels per head.
        groups: Query heads per kv head; 1 for multi-head attention.
        rows: Where q, k and v are one module, the outputs of it that are the query's, the key's and the value's, each
            int64 in the order of the heads; None where they are three.
        query_rows: Where q returns more than the query (a gate beside it), the outputs that are the query's, int64 in
            the order of the heads; the others stay dense. None where all are.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    kept_qk: Tensor
    kept_vo: Tensor
    head_dim: int
    groups: int = 1
    rows: tuple[Tensor, Tensor, Tensor] | None = None
    query_rows: Tensor | None = None


@contextmanager
def masked_dense(
    sites: Sequence[MaskedFFN | MappedFFN | MaskedAttention | ContextExit], output_mask: Tensor
) -> Iterator[None]:
    """Run an eager model with its sites sparsified by masks at full dense cost.

        with masked_dense(sites, output_mask):
            loss = model(input_ids, labels=labels).loss
        loss.backward()

    Gradients are plain autograd's of the masked function. With gradient checkpointing, run the backward inside the
    context too: the recomputed forward needs the hooks. They are removed on exit, after an error as well.

    Args:
        sites: The blocks to sparsify; any layer that maps the last dimension will do (`nn.Linear`, `Conv1D`, ...).
        output_mask: Bool, (B, S) or (N,), true at output tokens; projections may see (B, S, C) or (N, C).

    Raises:
        ValueError: At the forward, if a projection sees another number of tokens, or a kept index is out of range.
    """
    with ExitStack() as stack:
        for site in sites:
            if isinstance(site, MaskedFFN):
                _mask_input(stack, site.out_projection, output_mask, site.kept)
                continue
            if isinstance(site, MappedFFN):
                _map_block(stack, site, output_mask)
                continue
            if isinstance(site, ContextExit):
                exit_context(stack, site, output_mask)
                continue
            kept_q = expand_kv_channels(site.kept_qk, site.head_dim, site.groups)
            if site.query_rows is not None:
                dense = torch.ones(_base_layer(site.q).weight.shape[0], dtype=torch.bool)  # type: ignore[arg-type,index]
                dense[site.query_rows] = False
                kept_q = torch.cat([site.query_rows[kept_q], dense.nonzero().flatten()])
            masked = [(site.q, kept_q), (site.k, site.kept_qk), (site.v, site.kept_vo)]
            if site.rows is not None:
                masked = [(site.q, torch.cat([r[kept] for r, (_, kept) in zip(site.rows, masked, strict=True)]))]
            for module, kept in masked:
                _mask_output(stack, _base_layer(module), output_mask, kept)
                _mask_dora(stack, module, output_mask, kept)
            kept_o = expand_kv_channels(site.kept_vo, site.head_dim, site.groups)
            _mask_input(stack, _base_layer(site.o), output_mask, kept_o)
            _mask_dora(stack, site.o, output_mask, None)
        yield


def _base_layer(module: nn.Module) -> nn.Module:
    """Follow `base_layer` down to the layer that holds the frozen weight."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _mask_input(stack: ExitStack, module: nn.Module, output_mask: Tensor, kept: Tensor) -> None:
    """Hook a module so that it reads its first argument masked."""
    handle = module.register_forward_pre_hook(lambda _, args: (_masked(args[0], output_mask, kept), *args[1:]))
    stack.callback(handle.remove)


def _mask_output(stack: ExitStack, module: nn.Module, output_mask: Tensor, kept: Tensor) -> None:
    """Hook a module so that it returns its output masked."""
    handle = module.register_forward_hook(lambda _, args, output: _masked(output, output_mask, kept))
    stack.callback(handle.remove)


def _map_block(stack: ExitStack, site: MappedFFN, output_mask: Tensor) -> None:
    """Hook a block so that it returns the map of its input at context tokens."""
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = args[:1]

    def put(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        x = x.detach() if site.detached else x
        mapped = (x @ site.q.T) @ site.u.T + site.bias
        return torch.where(output_mask.reshape(*output.shape[:-1], 1), output, mapped)

    stack.callback(site.in_projection.register_forward_pre_hook(remember).remove)
    stack.callback(site.out_projection.register_forward_hook(put).remove)


def _mask_dora(stack: ExitStack, module: nn.Module, output_mask: Tensor, kept: Tensor | None) -> None:
    """Hook the DoRA layers of a PEFT module so that every product with the frozen weight that they read is masked.

    Without dropout they read the output so far, and take the whole bias off it: what a dropped channel has lost is put
    back before. With dropout they multiply the weight themselves: the masked layer is run for them.

    Args:
        stack: Removes the hooks.
        module: PEFT's wrapper, or any other module, which has none.
        output_mask: Bool, (B, S) or (N,).
        kept: The output channels that context tokens keep; None where it is the input that is masked.
    """

    def hook(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        layer, result = kwargs["base_layer"], kwargs["base_result"]
        if result is None:
            result = layer(args[0])
        if layer.bias is not None and kept is not None:
            whole = layer.bias.expand(*result.shape)
            result = result + (whole - _masked(whole, output_mask, kept))
        return args, {**kwargs, "base_result": result}

    for layer in getattr(module, "lora_magnitude_vector", {}).values():
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)


def _masked(x: Tensor, output_mask: Tensor, kept: Tensor) -> Tensor:
    """Zero the channels that are not kept, at context tokens only.

    Selects and never multiplies: what survives is bit-equal, and an infinity in a dropped channel leaves no NaN.
    """
    *tokens, width = x.shape
    if output_mask.numel() != x.numel() // width:
        raise ValueError(f"output_mask has {output_mask.numel()} tokens, the projection sees {tuple(tokens)}")
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < width:
        raise ValueError(f"kept indices reach from {int(kept.min())} to {int(kept.max())} in a width of {width}")
    channels = torch.zeros(width, dtype=torch.bool, device=x.device)
    channels[kept] = True
    return torch.where(output_mask.reshape(*tokens, 1) | channels, x, 0)
