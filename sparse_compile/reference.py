"""Hold the semantics of contextual sparsity as plain PyTorch.

Every fast path of the project is tested against this file. It works on the unmodified eager model through hooks, and it
shares no code with the passes: a fault in a pass cannot hide in its oracle.

Source: SparseLoRA (arXiv 2506.16500): its sparsity criteria, its SVD estimator, its split of context and output tokens.
Where the published code departs from the formulas (gradients of sparse attention, grouped-query heads, adapters inside
the FFN), the formulas hold here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Projection: TypeAlias = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]
"""What a score reads: factors `(A, B)` of the weight alone (the predictor), or a function of (M, in) rows: the true
layer (the oracle criterion), or `lambda rows: rows @ a @ b + bias`."""

PredictorTokens: TypeAlias = Literal["mean", "all"] | int
"""Which context tokens a score reads: one mean per sequence, all, or that many evenly spaced ones per sequence."""


# --- Roles ------------------------------------------------------------------------------------------------------------


def output_mask_from_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mark the output tokens: positions that carry a label, or predict one.

    Position t predicts the token at t + 1: the last prompt position is output. All others, padding too, are context.

    Args:
        labels: Integer (B, S), unshifted, as Hugging Face models take them.
        ignore_index: The label that the loss ignores.

    Returns:
        Bool (B, S), true at output tokens.

    Source: SparseLoRA, token sensitivity.
    """
    counted = labels != ignore_index
    output = counted.clone()
    output[:, :-1] |= counted[:, 1:]
    return output


def scored_positions(output_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mark the positions that take part in a channel score, (B, S): context tokens that are not padding.

    Args:
        output_mask: Bool (B, S), true at output tokens.
        attention_mask: (B, S), zero at padding; None where there is none.
    """
    scored = ~output_mask
    return scored if attention_mask is None else scored & (attention_mask != 0)


# --- Predictor --------------------------------------------------------------------------------------------------------


def low_rank_factors(weight: Tensor, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Factor the transpose of a frozen weight as A B by a full SVD, the best approximation of its rank.

    Args:
        weight: (out, in), as `nn.Linear` stores it.
        rank: Number of singular values kept, at most min(out, in).

    Returns:
        A = U_r sqrt(S_r), (in, rank), and B = sqrt(S_r) V_r, (rank, out), in the weight's dtype.

    Source: SparseLoRA, SVD sparsity estimator.
    """
    u, s, vh = torch.linalg.svd(weight.detach().T, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def mean_over_context(x: Tensor, scored: Tensor) -> Tensor:
    """Average the scored positions of each sequence.

    Args:
        x: (B, S, C). Values at positions that are not scored are never read: a NaN there does no harm.
        scored: Bool (B, S).

    Returns:
        (B, C), summed in fp32 or wider, in the dtype of x; zero for a sequence without a scored position.
    """
    wide = torch.where(scored[..., None], x, 0).to(_score_dtype(x))
    count = scored.sum(dim=1, keepdim=True).clamp(min=1)
    return (wide.sum(dim=1) / count).to(x.dtype)


def predictor_rows(x: Tensor, scored: Tensor, tokens: PredictorTokens) -> Tensor:
    """Gather the rows that a score reads.

    An integer n reads, of the c scored positions of a sequence, those of rank floor(i * c / n) for i in 0..n-1, each
    once: evenly spaced from the first on, and all of them where c <= n.

    Args:
        x: (B, S, C), the input of a block's projections.
        scored: Bool (B, S).
        tokens: `"mean"` (one averaged row per sequence that has a scored position), a positive integer, or `"all"`.

    Returns:
        (M, C); M may be 0. A sequence without a scored position adds no row.

    Raises:
        ValueError: If `tokens` is none of the above.
    """
    if tokens == "mean":
        return mean_over_context(x, scored)[scored.any(dim=1)]
    if tokens == "all":
        return x[scored]
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f'predictor_tokens must be "mean", "all" or a positive integer, not {tokens!r}')
    rows = []
    for sequence, keep in zip(x, scored, strict=True):
        context = sequence[keep]
        count = len(context)
        ranks = sorted({i * count // tokens for i in range(tokens)}) if count else []
        rows.append(context[ranks])
    return torch.cat(rows)


# --- Channel scores ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ffn_scores(
    x: Tensor,
    scored: Tensor,
    projections: Sequence[Projection],
    region: Callable[..., Tensor],
    *,
    predictor_tokens: PredictorTokens = 16,
) -> Tensor:
    """Score the intermediate channels of an FFN: score_j = ||h_j||_2 over the context tokens.

    Args:
        x: (B, S, hidden), the input of the block's in-projections.
        scored: Bool (B, S), see `scored_positions`.
        projections: The in-projections in the order `region` takes them: (gate, up), or one when ungated.
        region: The elementwise region between in- and out-projection: `lambda g, u: silu(g) * u`, or `gelu`.
        predictor_tokens: Which context tokens are read. `"all"` is the paper's formula; `"mean"`, the published code's.

    Returns:
        (ffn,), fp32 or wider, no gradient; zero without a scored position.

    Source: SparseLoRA, L2-norm criterion for the FFN.
    """
    rows = predictor_rows(x, scored, predictor_tokens)
    return _norms(region(*(_project(rows, projection) for projection in projections)))


@torch.no_grad()
def value_scores(x: Tensor, scored: Tensor, v: Projection, *, predictor_tokens: PredictorTokens = "all") -> Tensor:
    """Score the kv channels for V and O: score_c = ||v_c||_2 over the context tokens.

    Args:
        x: (B, S, hidden), the input of the attention block's projections.
        scored: Bool (B, S), see `scored_positions`.
        v: The value projection.
        predictor_tokens: Which context tokens are read.

    Returns:
        (n_kv * head_dim,), fp32 or wider, no gradient.

    Source: SparseLoRA, L2-norm criterion for V and O.
    """
    return _norms(_project(predictor_rows(x, scored, predictor_tokens), v))


@torch.no_grad()
def query_key_scores(
    x: Tensor,
    scored: Tensor,
    q: Projection,
    k: Projection,
    *,
    head_dim: int,
    groups: int = 1,
    predictor_tokens: PredictorTokens = "all",
) -> Tensor:
    """Score the kv channels for Q and K: the product of the two channels' norms.

    For kv channel (head j, channel d) the score is ||k_{j,d}|| * mean over g < G of ||q_{j*G+g,d}||: what is averaged
    are the norms of the G query channels that meet this key channel, all before the rotary embedding.

    Args:
        x: (B, S, hidden), the input of the attention block's projections.
        scored: Bool (B, S), see `scored_positions`.
        q: The query projection, n_kv * groups * head_dim wide.
        k: The key projection, n_kv * head_dim wide.
        head_dim: Channels per head.
        groups: G, query heads per kv head; 1 for multi-head attention.
        predictor_tokens: Which context tokens are read.

    Returns:
        (n_kv * head_dim,), fp32 or wider, no gradient.

    Source: SparseLoRA, QK-norm criterion; in grouped-query attention, query head h reads kv head h // G.
    """
    rows = predictor_rows(x, scored, predictor_tokens)
    q_norms = _norms(_project(rows, q)).view(-1, groups, head_dim)
    k_norms = _norms(_project(rows, k)).view(-1, head_dim)
    return (k_norms * q_norms.mean(dim=1)).flatten()


def _project(rows: Tensor, projection: Projection) -> Tensor:
    """Apply the low-rank factors, or the layer itself."""
    if not isinstance(projection, tuple):
        return projection(rows)
    a, b = projection
    dtype = torch.promote_types(rows.dtype, a.dtype)
    return rows.to(dtype) @ a.to(dtype) @ b.to(dtype)


def _norms(activations: Tensor) -> Tensor:
    """Take each column's L2 norm over the rows of (M, C); zero where M is 0."""
    return activations.to(_score_dtype(activations)).square().sum(dim=0).sqrt()


def _score_dtype(x: Tensor) -> torch.dtype:
    """Widen half precision: squares of fp16 activations overflow."""
    return torch.promote_types(x.dtype, torch.float32)


# --- Choice of channels -----------------------------------------------------------------------------------------------


def kept_count(channels: int, sparsity: float) -> int:
    """Count the channels kept: max(1, n - floor(n * s)), with n * s in exact decimal arithmetic.

    Binary floats would keep 72 of 100 channels at sparsity 0.29, as 100 * 0.29 is 28.999999999999996.

    Args:
        channels: n: the FFN's width, or n_kv * head_dim.
        sparsity: s, the share of channels dropped, in [0, 1), read as its shortest decimal form.
    """
    return max(1, channels - int(channels * Decimal(str(sparsity))))


def top_channels(scores: Tensor, k: int) -> Tensor:
    """Choose the k channels of highest score; of equal scores, the lowest index.

    A score vector that is all zero or holds a NaN or an infinity says nothing: the lowest k indices are kept.

    Args:
        scores: (n,), not negative.
        k: How many, 1 <= k <= n.

    Returns:
        Int64 (k,), sorted ascending.

    Raises:
        ValueError: If k is out of range.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"cannot keep {k} of {len(scores)} channels")
    if not scores.isfinite().all():
        return torch.arange(k, device=scores.device)
    # `topk` leaves the order of ties open; a stable sort keeps the lowest index first, all-zero scores included.
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def expand_kv_channels(kept: Tensor, head_dim: int, groups: int) -> Tensor:
    """Map kept kv channels to the query channels that meet them, in q_proj's output and in o_proj's input.

    Query head h reads kv head h // G, so kv channel j * head_dim + d stands for (j * G + g) * head_dim + d, g < G.

    Args:
        kept: Int64 (k,), indices in n_kv * head_dim.
        head_dim: Channels per head.
        groups: G, query heads per kv head.

    Returns:
        Int64 (k * groups,), indices in n_kv * groups * head_dim, sorted ascending.
    """
    head = kept.div(head_dim, rounding_mode="floor")
    channel = kept - head * head_dim
    group = torch.arange(groups, device=kept.device)
    return ((head * groups + group[:, None]) * head_dim + channel).flatten().sort().values


# --- Masked-dense execution -------------------------------------------------------------------------------------------


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


@contextmanager
def masked_dense(sites: Sequence[MaskedFFN | MaskedAttention], output_mask: Tensor) -> Iterator[None]:
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
            kept_q = expand_kv_channels(site.kept_qk, site.head_dim, site.groups)
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
