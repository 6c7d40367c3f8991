"""Capture the sites of a dense model, so that each can be run alone with other channels; for `predictor_quality.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from predictor_text import Batch, load_encoder, read_batches
from torch import Tensor, nn

from sparse_compile.predictor.svd import factorize
from sparse_compile.reference import (
    MaskedAttention,
    MaskedFFN,
    PredictorTokens,
    Projection,
    ffn_scores,
    kept_count,
    masked_dense,
    output_mask_from_labels,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)


def load_model(folder: Path) -> Any:
    """Load a causal language model for inference in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(folder: Path, data: Path, *, batches: int, batch_size: int) -> dict[tuple[str, int], list[Probe]]:
    """Run a model over real text; return the probes of each kind and block, one for each batch."""
    model, factors = load_model(folder), Factors()
    texts = read_batches(data, load_encoder(folder), model.config, batches=batches, batch_size=batch_size)
    by_site: dict[tuple[str, int], list[Probe]] = {}
    for batch in texts:
        for probe in probes(model, batch, factors):
            by_site.setdefault((probe.kind, probe.block), []).append(probe)
    return by_site


@dataclass(frozen=True, eq=False)
class Probe:
    """One kind of site in one block, with the activations of one batch.

    Attributes:
        kind: `"FFN"`, `"V/O"` or `"Q/K"`.
        block: Index of the block.
        channels: n, the number of channels to choose from.
        score: Scores (n,) from a rank and the tokens to read; rank None reads the true layers.
        run: The residual update of the block, (B, S, hidden), with these channels kept for context tokens.
        dense: The same with all channels.
        context: Bool (B, S): context tokens that are not padding.
        tokens: Bool (B, S): all tokens that are not padding.
    """

    kind: str
    block: int
    channels: int
    score: Callable[[int | None, PredictorTokens], Tensor]
    run: Callable[[Tensor], Tensor]
    dense: Tensor
    context: Tensor
    tokens: Tensor

    def choose(self, sparsity: float, rank: int | None, tokens: PredictorTokens) -> Tensor:
        """Return the channels kept, from factors of this rank; rank None is the oracle."""
        return top_channels(self.score(rank, tokens), kept_count(self.channels, sparsity))

    def errors(self, kept: Tensor) -> tuple[float, float]:
        """Return ||sparse - dense|| / ||dense|| of the residual update over context tokens, and over all tokens."""
        difference = self.run(kept) - self.dense
        context, everywhere = (
            (difference[mask].norm() / self.dense[mask].norm()).item() for mask in (self.context, self.tokens)
        )
        return context, everywhere


@dataclass(frozen=True, eq=False)
class _Call:
    """What a module of the dense model was called with, and what it returned."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def again(self) -> Tensor:
        return _first(self.module(*self.args, **self.kwargs))


def _first(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


class Factors:
    """Give the low-rank factors that the backend would compute, each once."""

    def __init__(self) -> None:
        self._found: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: Any, rank: int | None) -> Projection:
        """Return the factors of a linear layer, or the layer itself for rank None."""
        if rank is None:
            return layer  # type: ignore[no-any-return]
        if (layer, rank) not in self._found:
            factors = factorize(layer.weight, rank, seed=0)
            self._found[layer, rank] = factors.a, factors.b
        return self._found[layer, rank]


@torch.no_grad()
def probes(model: Any, batch: Batch, factors: Factors) -> list[Probe]:
    """Run the dense model once and return a probe for each site, block after block.

    Args:
        model: A Llama-like causal language model: blocks in `model.model.layers`, the usual names of projections.
        batch: What to run.
        factors: Where predictors come from.
    """
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls[module] = _Call(module, args, kwargs, _first(result))

    layers = model.model.layers
    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for layer in layers
        for module in (layer.mlp, layer.self_attn)
    ]
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    output_mask = output_mask_from_labels(batch.labels)
    masks = output_mask, scored_positions(output_mask, batch.attention_mask), batch.attention_mask.bool()
    found = []
    for block, layer in enumerate(layers):
        found.append(_ffn_probe(block, calls[layer.mlp], factors, *masks))
        found += _attention_probes(block, calls[layer.self_attn], model.config, factors, *masks)
    return found


def _ffn_probe(block: int, call: _Call, factors: Factors, output: Tensor, scored: Tensor, real: Tensor) -> Probe:
    mlp = call.module

    def score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        projections = [factors(layer, rank) for layer in (mlp.gate_proj, mlp.up_proj)]
        region = lambda gate, up: mlp.act_fn(gate) * up  # noqa: E731
        return ffn_scores(call.args[0], scored, projections, region, predictor_tokens=tokens)

    def run(kept: Tensor) -> Tensor:
        with masked_dense([MaskedFFN(mlp.down_proj, kept)], output):
            return call.again()

    return Probe("FFN", block, mlp.down_proj.in_features, score, run, call.result, scored, real)


def _attention_probes(
    block: int, call: _Call, config: Any, factors: Factors, output: Tensor, scored: Tensor, real: Tensor
) -> list[Probe]:
    attention, x = call.module, call.kwargs["hidden_states"]
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    groups = config.num_attention_heads // config.num_key_value_heads
    channels = k.out_features
    everything = torch.arange(channels)

    def qk_score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        found = factors(q, rank), factors(k, rank)
        head_dim = attention.head_dim
        return query_key_scores(x, scored, *found, head_dim=head_dim, groups=groups, predictor_tokens=tokens)

    def vo_score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        return value_scores(x, scored, factors(v, rank), predictor_tokens=tokens)

    def run(kept_qk: Tensor, kept_vo: Tensor) -> Tensor:
        with masked_dense([MaskedAttention(q, k, v, o, kept_qk, kept_vo, attention.head_dim, groups)], output):
            return call.again()

    shared = call.result, scored, real
    return [
        Probe("V/O", block, channels, vo_score, lambda kept: run(everything, kept), *shared),
        Probe("Q/K", block, channels, qk_score, lambda kept: run(kept, everything), *shared),
    ]
