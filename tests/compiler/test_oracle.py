"""The compiled training step against the masked-dense oracle: loss and the gradient of every trained parameter.

The oracle is the unmodified eager model with hooks (`sparse_compile.reference`); only the chosen channels are shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoder
from models import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    BATCHES,
    DecoderConfig,
    Fp64Decoder,
    Kept,
    batch,
    fp64_decoder,
    low_rank_dead_channel_decoder,
    masked_sites,
    tiny_llama,
    variants,
    with_lora,
)
from oracle import (
    SPARSITY,
    Step,
    assert_differs,
    assert_same_step,
    oracle_step,
    sparse_step,
    train_step,
)
from sparse_compile import reference
from sparse_compile.predictor.svd import factorize
from sparse_compile.reference import masked_dense, output_mask_from_labels, scored_positions
from sweeps import slow, sweep
from tolerances import Tolerance

pytestmark = pytest.mark.usefixtures("eager_inductor")

VARIANTS = variants(DecoderConfig(layers=2))


def compiled(model: nn.Module, dynamic: bool | None = False, **options: Any) -> Any:
    # Sparsity by itself: the exact optimisations take the last block's feed-forward site over, and have tests of their
    # own beside those of both together below.
    options = {"preset": "none", "layer_sparsity": SPARSITY, "strict": True, **options}
    return torch.compile(model, backend="sparselora", dynamic=dynamic, options=options)


def llama(**arguments: Any) -> nn.Module:
    return tiny_llama(layers=2, **arguments)


def masked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that always has an attention mask: ragged and padded batches share a graph."""
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}


# --- Models that stay in fp64 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sweep(VARIANTS, "gqa", "ungated"))
def test_every_batch_equals_the_oracle(variant: str) -> None:
    model = Fp64Decoder(VARIANTS[variant])
    call = compiled(model)
    for kind, shape in BATCHES.items():
        inputs = batch(61, **shape)
        inputs = inputs if kind == "packed" else masked(inputs)
        step, kept = sparse_step(model, call, inputs)
        assert kept.keys() == SPARSITY.keys()
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=kind)
    assert_differs(step, train_step(model, model, inputs))


@pytest.mark.parametrize("layers", [slow(2), 3])
@pytest.mark.parametrize("variant", sweep(VARIANTS, "gqa"))
def test_sparsity_and_exact_optimisations_together(variant: str, layers: int) -> None:
    """With two blocks the sparse ones reach into what runs on the rows of the loss alone, with three they do not."""
    model = Fp64Decoder(replace(VARIANTS[variant], layers=layers))
    call = compiled(model, preset="exact")
    for kind in ("left", "packed"):
        inputs = batch(61, **BATCHES[kind])
        step, kept = sparse_step(model, call, inputs)
        assert kept.keys() == SPARSITY.keys() - ({"layers.1.mlp"} if layers == 2 else set())
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=kind)


@pytest.mark.parametrize("variant", sweep(["gqa", "eager", "ungated"], "gqa"))
def test_through_aot_autograd(variant: str, aot_eager_inductor: Any) -> None:
    """Traced ahead of time and cut by the partitioner, with and without the exact optimisations."""
    model = Fp64Decoder(VARIANTS[variant])
    inputs = batch(61, padding="left")
    for preset in ("none", "exact"):
        step, kept = sparse_step(model, compiled(model, preset=preset), inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=preset)
    assert aot_eager_inductor.sparse == [True, True]


@pytest.mark.slow
def test_every_length_and_split_equals_the_oracle(aot_eager_inductor: Any) -> None:
    # Without any mask attention is causal by a flag. One graph runs every shape, a batch of one and extreme splits too.
    model = fp64_decoder(layers=2)
    call = compiled(model, dynamic=True)
    shapes: list[dict[str, Any]] = [
        {},
        {"rows": 2, "length": 23},
        {"rows": 5, "length": 9, "prompts": [9, 0, 3, 8, 1]},
        {"prompts": [0, 0, 0]},
        {"prompts": [16, 16, 15]},
    ]
    for seed, shape in enumerate(shapes):
        inputs = batch(61, seed=seed, **shape)
        step, kept = sparse_step(model, call, inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=str(shape))
    assert len(aot_eager_inductor.graphs) == 1


@pytest.mark.parametrize("adapters", [("q_proj",), ("down_proj",), ("gate_proj", "o_proj")], ids=str)
def test_blocks_with_few_adapters(adapters: tuple[str, ...]) -> None:
    # A block of frozen layers alone still passes the gradient on to the adapters before it.
    model = fp64_decoder(layers=2, adapters=adapters, bias=True)
    inputs = batch(61, padding="left")
    step, kept = sparse_step(model, compiled(model), inputs)
    assert kept.keys() == SPARSITY.keys()
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


@pytest.mark.parametrize("site", ["layers.0.mlp", "layers.0.self_attn"])
def test_one_site_alone(site: str) -> None:
    model = fp64_decoder(layers=1, bias=True)
    inputs = batch(61)
    step, kept = sparse_step(model, compiled(model, layer_sparsity={site: SPARSITY[site]}), inputs)
    assert list(kept) == [site]
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


def test_gradients_are_those_of_the_sparse_function() -> None:
    """Central differences of the compiled loss along a random direction in all adapters.

    The choice of channels is locally constant, which the recorded channels confirm.
    """
    model = fp64_decoder(layers=2, bias=True)
    call = compiled(model)
    inputs = batch(61, rows=2, length=11)
    step, kept = sparse_step(model, call, inputs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in trained.items()}
    size = 1e-5
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.add_(direction[name], alpha=sign * size)
        moved, kept_moved = sparse_step(model, call, inputs)
        assert_same_channels(kept_moved, kept)
        losses.append(moved.loss)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.sub_(direction[name], alpha=sign * size)
    slope = float((losses[0] - losses[1]) / (2 * size))
    expected = float(sum((step.gradients[name] * direction[name]).sum() for name in trained))
    # The truncation error is of order size^2 times the third derivative along a direction of length 60.
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_dropout_draws_what_the_eager_model_draws(aot_eager_inductor: Any) -> None:
    # Dropout sits before A, on all tokens, in the order of the eager model: one seed gives one result.
    model = with_lora(llama(dtype=torch.float64), (*ATTENTION_TARGETS, "gate_proj", "up_proj"), dropout=0.3)
    inputs = batch(97)
    call = compiled(model)
    step, kept = sparse_step(model, call, inputs, seed=5)
    assert_same_step(step, oracle_step(model, kept, inputs, seed=5), torch.float64, tolerance=HF_FP64)
    assert_differs(step, oracle_step(model, kept, inputs, seed=6))


def test_dropout_inside_the_intermediate() -> None:
    """Before the out-projection's adapter the two roles draw apart, so values are not those of the eager model.

    In the mean over seeds they are: dropout is unbiased, and the loss nearly linear in a small adapter.
    """
    model = with_lora(llama(dtype=torch.float64), ("down_proj",), dropout=0.2)
    inputs = batch(97)
    call = compiled(model)
    losses = []
    for seed in range(20):
        step, kept = sparse_step(model, call, inputs, seed=seed)
        assert all(gradient.isfinite().all() for gradient in step.gradients.values())
        losses.append(step.loss)
    without = oracle_step(model.eval(), kept, inputs)
    spread = torch.stack(losses).std()
    assert spread > 0
    assert abs(float(torch.stack(losses).mean() - without.loss)) < 3 * float(spread)


# --- Hugging Face and PEFT --------------------------------------------------------------------------------------------

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")


@pytest.mark.parametrize(
    ("attention", "targets", "kinds"),
    [
        ("sdpa", ATTENTION_TARGETS, ("ragged", "left", "right")),
        # Its additive mask makes NaN of padding on the left in fp64, without any compiler.
        slow("eager", ALL_TARGETS, ("right",)),
    ],
)
def test_llama_with_peft(attention: str, targets: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    model = with_lora(llama(dtype=torch.float64, attention=attention, bias=True), targets)
    call = compiled(model)
    for kind in kinds:
        inputs = masked(batch(97, **BATCHES[kind]))
        step, kept = sparse_step(model, call, inputs)
        assert len(kept) == len(SPARSITY)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64, what=kind)


def test_llama_in_fp32() -> None:
    model = with_lora(llama(kv_heads=4), ALL_TARGETS)
    inputs = batch(97, padding="left")
    step, kept = sparse_step(model, compiled(model), inputs)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)


def test_bf16_base_with_fp32_adapters(aot_eager_inductor: Any) -> None:
    model = with_lora(llama(dtype=torch.bfloat16), ALL_TARGETS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    inputs = batch(97, padding="right")
    step, kept = sparse_step(model, compiled(model), inputs)
    assert {g.dtype for g in step.gradients.values()} == {torch.float32}
    # Activations are rounded at every operator, forward and backward: forty times on the way to the first block.
    tolerance = Tolerance(max=0.16, rms=3e-2, why="twice the table's, for sqrt(40) roundings instead of sqrt(10)")
    assert_same_step(step, oracle_step(model, kept, inputs), torch.bfloat16, tolerance=tolerance)


class Autocast(nn.Module):
    """A model whose forward enters autocast, as Accelerate's `bf16=True` makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ("outside the graph", torch.bfloat16),
        ("inside the graph", torch.bfloat16),
        ("outside the graph", torch.float16),
    ],
    ids=str,
)
def test_autocast(where: str, dtype: torch.dtype, aot_eager_inductor: Any) -> None:
    model = Autocast(with_lora(llama(), ALL_TARGETS)) if "inside" in where else with_lora(llama(), ALL_TARGETS)
    call = compiled(model)
    inputs = batch(97, padding="left")
    with torch.autocast("cpu", dtype, enabled="outside" in where):
        step, kept = sparse_step(model, call, inputs)
        expected = oracle_step(model, kept, inputs)
        expected_dense = train_step(model, model, inputs)
    assert_same_step(step, expected, dtype)
    assert_differs(step, expected_dense)


# --- Gradient checkpointing -------------------------------------------------------------------------------------------


class CheckpointedLayer(decoder.DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return checkpoint(super().forward, x, cos, sin, mask, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpoints_of_a_hand_written_model(
    attention: str, monkeypatch: pytest.MonkeyPatch, aot_eager_inductor: Any
) -> None:
    monkeypatch.setattr(decoder, "DecoderLayer", CheckpointedLayer)
    model = fp64_decoder(layers=2, attention=attention, bias=True)
    call = compiled(model)
    for kind in ("ragged", "left"):
        inputs = masked(batch(61, **BATCHES[kind]))
        step, kept = sparse_step(model, call, inputs)
        assert kept.keys() == SPARSITY.keys()
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=kind)


# --- Dead channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "slack"), [(2, 0), (4, 0), (4, 3)], ids=["gqa", "mha", "mha, three more"])
def test_dropping_dead_channels_changes_nothing(kv_heads: int, slack: int) -> None:
    config = DecoderConfig(layers=2, kv_heads=kv_heads)
    model, alive = low_rank_dead_channel_decoder(config, kept_ffn=6, kept_kv=5)
    width = kv_heads * config.head_dim
    ffn, attention = 1 - (6 + slack) / config.ffn, 1 - (5 + slack) / width
    sparsity = {f"layers.{i}.{kind}": s for i in (0, 1) for kind, s in (("mlp", ffn), ("self_attn", attention))}
    call = compiled(model, layer_sparsity=sparsity)
    for kind in ("ragged", "left", "right"):
        inputs = masked(batch(61, **BATCHES[kind]))
        step, kept = sparse_step(model, call, inputs)
        for site, channels in flat(kept).items():
            assert len(channels) == (6 if site.endswith("mlp") else 5) + slack
            assert set(flat(alive)[site].tolist()) <= set(channels.tolist()), site
        assert_same_step_or_zero(step, train_step(model, model, inputs))


def assert_same_step_or_zero(actual: Step, expected: Step) -> None:
    # Rows and columns of an adapter that belong to dead channels have no gradient: an absolute bound beside the other.
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-9, atol=1e-12)


# --- Choice of channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "tokens"),
    [slow("eager", "mean"), ("eager", 3), slow("eager", "all"), ("ungated", "mean"), slow("mha", "all")],
)
def test_channels_are_those_of_the_published_scores(variant: str, tokens: str | int) -> None:
    config = VARIANTS[variant]
    model = Fp64Decoder(config)
    call = compiled(model, predictor_tokens=tokens)
    inputs = batch(61, rows=4, length=20, padding="left")
    _, kept = sparse_step(model, call, inputs)
    scored = scored_positions(output_mask_from_labels(inputs["labels"]), inputs["attention_mask"])
    for site, x in site_inputs(model, kept, inputs).items():
        block = model.get_submodule(site)
        if site.endswith("mlp"):
            names = ["up_proj"] if block.gate_proj is None else ["gate_proj", "up_proj"]
            projections = [predicted(getattr(block, name)) for name in names]
            scores = reference.ffn_scores(x, scored, projections, config.region, predictor_tokens=tokens)
            assert torch.equal(kept[site], reference.top_channels(scores, len(kept[site]))), site
            continue
        # Attention scores read all context tokens, whatever an FFN score reads.
        q, k, v = (predicted(getattr(block, name)) for name in ("q_proj", "k_proj", "v_proj"))
        head_dim, groups = config.head_dim, config.heads // config.kv_heads
        qk = reference.query_key_scores(x, scored, q, k, head_dim=head_dim, groups=groups)
        vo = reference.value_scores(x, scored, v)
        for channels, scores in zip(kept[site], (qk, vo), strict=True):
            assert torch.equal(channels, reference.top_channels(scores, len(channels))), site


def predicted(projection: nn.Module) -> Any:
    """The low-rank estimate of a frozen layer, its bias included."""
    base = getattr(projection, "base_layer", projection)
    factors = factorize(base.weight, rank=8, seed=0)
    return lambda rows: rows @ factors.a @ factors.b + (0 if base.bias is None else base.bias)


def site_inputs(model: nn.Module, kept: Kept, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each site reads in the sparse forward: what a block reads depends on the sites before it."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: found.__setitem__(site, args[0].detach())
        )
        for site in kept
    ]
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def flat(kept: Kept) -> dict[str, Tensor]:
    """One entry for each choice."""
    items: Iterable[Any] = kept.items()
    pairs = [(name, c if isinstance(c, tuple) else (c,)) for name, c in items]
    return {f"{'' if i == 0 else 'vo of '}{name}": c for name, channels in pairs for i, c in enumerate(channels)}


def assert_same_channels(actual: Kept, expected: Kept) -> None:
    left, right = flat(actual), flat(expected)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
