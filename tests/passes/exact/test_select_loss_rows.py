"""Leaving out rows that the loss ignores changes neither the loss nor any gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from decoder import ALL_TARGETS, DecoderConfig, Fp64Decoder, LoRALinear, variants
from graphs import (
    ANALYSES,
    Captured,
    Head,
    aot_eager,
    assert_golden,
    capture,
    causal_loss,
    frozen,
    gradients_of,
    graph_eager,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from models import BATCHES, batch, tiny_llama, with_lora
from oracle import assert_same_step, oracle_step, sparse_step, train_step
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.graph.read import op_name
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import PassOutcome
from sweeps import sweep
from tolerances import Tolerance, assert_close_rms

PASS = "select_loss_rows"
EXACT = SparseLoRAConfig(preset="exact")
Loss = Callable[[Tensor, Tensor], Tensor]


def narrowed(model: nn.Module, *args: Tensor, **options: Any) -> tuple[Captured, PassOutcome]:
    dynamic = options.pop("dynamic", ())
    captured = capture(model, *args, config=SparseLoRAConfig(**{"preset": "exact", **options}), dynamic=dynamic)
    return captured, run_passes(captured, *ANALYSES, PASS)[PASS]


def check(
    model: nn.Module,
    *args: Tensor,
    linears: int | None = None,
    seed: int | None = None,
    compiler: Callable[..., Any] = graph_eager,
) -> None:
    """Assert that the rewritten model, an fp64 one that returns its loss, gives eager's loss and gradients."""
    results = []
    for call in (lambda: run_rewritten(model, *args, config=EXACT, compiler=compiler), lambda: model(*args)):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(call())
    ran, expected = results
    (record,) = [record for record in ran.result.records if record.name == PASS]
    assert record.changed, ran.result.rejections
    if linears is not None:
        assert record.stats["linears"] == linears
    assert_close_rms(ran.value, expected, name="loss")
    gradients = gradients_of(expected, model)
    for name, actual in gradients_of(ran.value, model).items():
        assert gradients[name].any(), f"{name}: a gradient of zeros tests nothing"
        assert_close_rms(actual, gradients[name], name=name)


# --- Loss and gradients -----------------------------------------------------------------------------------------------


class LossOf(nn.Module):
    """A decoder that returns its loss alone."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = Fp64Decoder(config)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        loss = self.model(input_ids, labels, attention_mask)[0]
        assert loss is not None
        return loss


@pytest.mark.parametrize("name", variants())
def test_decoders(name: str) -> None:
    """The head, the last feed-forward block and the last output projection: adapters and all."""
    config = replace(variants()[name], layers=2)
    inputs = batch(config.vocab, padding="left")
    frozen_layers = 1 + 1 + (3 if config.gated else 2)
    adapted = sum(name in config.adapters for name in ("o_proj", "up_proj", "down_proj"))
    adapted += config.gated and "gate_proj" in config.adapters
    arguments = (inputs[key] for key in ("input_ids", "labels", "attention_mask"))
    compiler = aot_eager if name == "gqa" else graph_eager
    check(LossOf(config), *arguments, linears=frozen_layers + 2 * adapted, compiler=compiler)


@pytest.mark.parametrize("shape", BATCHES)
def test_batches(shape: str) -> None:
    inputs = batch(61, **BATCHES[shape])
    model = Fp64Decoder(DecoderConfig(layers=2))
    ran = run_rewritten(lambda **kwargs: model(**kwargs)[0], **inputs, config=EXACT)
    expected = model(**inputs)[0]
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value, model)
    for name, gradient in gradients_of(expected, model).items():
        assert_close_rms(actual[name], gradient, name=name)


LOSSES: dict[str, Loss] = {
    "mean": causal_loss,
    "sum over the items of a batch": lambda z, y: (
        F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum") / 7
    ),
    "label smoothing": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(
        z.view(-1, 11), F.pad(y, (0, 1), value=-100)[:, 1:].reshape(-1), torch.arange(11).double()
    ),
    "another ignore_index": lambda z, y: F.cross_entropy(
        z[:, :-1].flatten(0, 1), y[:, 1:].masked_fill(y[:, 1:] == -100, 0).flatten(), ignore_index=0
    ),
    "soft-capping": lambda z, y: causal_loss(3 * torch.tanh(z / 3), y),
    "scaling": lambda z, y: causal_loss(z * 0.25, y),
    "temperature of a channel": lambda z, y: causal_loss(z * torch.arange(1, 12).double().view(1, 1, -1), y),
    "shift 0": lambda z, y: F.cross_entropy(z.reshape(-1, 11), y.reshape(-1)),
    "slice of the sequence": lambda z, y: F.cross_entropy(z[..., :-2, :].reshape(-1, 11), y[..., 2:].reshape(-1)),
    "every second token": lambda z, y: F.cross_entropy(z[:, 1::2].reshape(-1, 11), y[:, ::2].reshape(-1)),
    "rows of batch one": lambda z, y: F.cross_entropy(z[1:].reshape(-1, 11), y[1:].reshape(-1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    check(Head(Block(), loss=LOSSES[name]), *tokens(rows=3, length=8, context=3), compiler=aot_eager)


class Block(nn.Module):
    """A feed-forward block with a residual connection: row-wise, so that the climb goes through it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = lora(8, 12), lora(12, 8)
        self.dropout = dropout
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (8,))
        h = self._adapted(self.up, F.relu(h))
        return x + F.dropout(input=self._adapted(self.down, h), p=self.dropout)

    def _adapted(self, layer: LoRALinear, x: Tensor) -> Tensor:
        branch = F.linear(F.linear(F.dropout(x, self.dropout), layer.lora_A), layer.lora_B)
        return layer.base_layer(x) + branch * layer.scale


class Tail(nn.Module):
    """An embedding, what mixes tokens, and then a body that keeps them apart."""

    def __init__(self, *body: nn.Module, loss: Loss = causal_loss) -> None:
        super().__init__()
        self.embed, self.body, self.head, self.loss = nn.Embedding(11, 8), nn.Sequential(*body), lora(8, 11), loss
        frozen(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(self.body(self.embed(input_ids).cumsum(1))), labels)


def test_climbs_through_a_block() -> None:
    check(Tail(Block(), Block()), *tokens(), linears=15)


def test_dropout_draws_what_it_would_have_drawn() -> None:
    check(Tail(Block(dropout=0.5), Block(dropout=0.5)), *tokens(rows=3, length=8), linears=15, seed=3)


class Views(nn.Module):
    """Views, reductions and halves within rows, dimensions counted from the front."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = lora(8, 16)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layer(x).view(x.shape[0], x.shape[1], 2, 8)
        heads = heads / heads.norm(dim=3, keepdim=True)
        gate, up = heads.flatten(2).chunk(2, dim=2)
        return x.sum(dim=2, keepdim=True) * gate.softmax(dim=2) + torch.tanh(up) * torch.ones(1, 1, 8).double()


def test_views_within_rows() -> None:
    check(Tail(Views()), *tokens(), linears=6)


@pytest.mark.parametrize(
    ("labelled", "loss"),
    [((), math.nan), ((3,), None), (tuple(range(6)), None)],
    ids=["no row", "one row", "no ignored row"],
)
def test_numbers_of_rows(labelled: tuple[int, ...], loss: float | None) -> None:
    ids, _ = tokens()
    labels = torch.full_like(ids, -100)
    labels[:1, list(labelled)] = ids[:1, list(labelled)]
    model = Tail(Block())
    if loss is None:
        check(model, ids, labels, compiler=aot_eager)
        return
    ran = run_rewritten(model, ids, labels, config=EXACT, compiler=aot_eager)
    assert ran.value.isnan() and model(ids, labels).isnan()
    assert gradients_of(ran.value, model).keys() == gradients_of(model(ids, labels), model).keys()


def test_a_sum_without_rows_is_zero() -> None:
    model = Tail(Block(), loss=LOSSES["sum over the items of a batch"])
    ids, labels = tokens(context=6)
    ran = run_rewritten(model, ids, labels, config=EXACT, compiler=aot_eager)
    assert ran.value == 0 and not any(gradient.any() for gradient in gradients_of(ran.value, model).values())


class CheckpointedFromTheFirstOp(Tail):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = checkpoint(lambda ids: self.body(self.embed(ids).cumsum(1)), input_ids, use_reentrant=False)
        return self.loss(self.head(hidden), labels)


def test_rows_are_saved_where_the_first_op_is_a_checkpoints() -> None:
    """Found again in the backward they would have a size of their own."""
    model = CheckpointedFromTheFirstOp(Block())
    check(model, *tokens(), linears=9, compiler=aot_eager)
    captured = capture(model, *tokens(), config=EXACT)
    run_passes(captured, "inline_checkpoint_bodies", *ANALYSES, PASS)
    marked = {op_name(node): node.meta.get("recompute") for node in captured.gm.graph.nodes}
    assert marked["loss_rows"] == CheckpointPolicy.MUST_SAVE
    assert marked["cumsum"] not in (None, CheckpointPolicy.MUST_SAVE)


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_of_rank_one(bias: bool) -> None:
    """One column: the gradient of a matrix product would compare the number of rows with 1."""
    model = Tail(Block(), Narrow(bias))
    model.head.lora_A, model.head.lora_B = (nn.Parameter(torch.ones(s).double()) for s in ((1, 8), (11, 1)))
    frozen(model)
    check(model, *tokens(), linears=13, compiler=aot_eager)


class Narrow(nn.Module):
    """A bottleneck of width one."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 1), lora(1, 8, bias=bias)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def test_a_trained_head_gets_its_whole_gradient() -> None:
    model = Tail(Block())
    model.head.base_layer.weight.requires_grad_(True)
    check(model, *tokens())


# --- Logits -----------------------------------------------------------------------------------------------------------


class WithLogits(Tail):
    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.head(self.body(self.embed(input_ids).cumsum(1)))
        return self.loss(logits, labels), logits


def test_logits_hold_rows_of_the_loss_and_nan() -> None:
    model, (ids, labels) = WithLogits(Block()), tokens(rows=3)
    ran = run_rewritten(model, ids, labels, config=EXACT)
    _, logits = ran.value
    _, expected = model(ids, labels)
    has_loss = F.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    assert logits.shape == expected.shape and logits.dtype == expected.dtype
    assert_close_rms(logits[has_loss], expected[has_loss])
    assert logits[~has_loss].isnan().all()


def sum_of_both(model: nn.Module, ids: Tensor, labels: Tensor, has_loss: Tensor) -> Tensor:
    loss, logits = model(ids, labels)
    return loss + logits[has_loss].sin().sum()


def test_gradients_through_the_logits() -> None:
    model, (ids, labels) = WithLogits(Block()), tokens(rows=3)
    has_loss = F.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    loss, logits = run_rewritten(model, ids, labels, config=EXACT, compiler=aot_eager).value
    actual = gradients_of(loss + logits[has_loss].sin().sum(), model)
    for name, gradient in gradients_of(sum_of_both(model, ids, labels, has_loss), model).items():
        assert_close_rms(actual[name], gradient, name=name)


def test_keep_logits() -> None:
    _, outcome = narrowed(WithLogits(Block()), *tokens(), keep_logits=True)
    assert not outcome.changed and rejections(outcome) == ["keep_logits asks for every row of the logits"]


def test_dynamic_length(aot_eager_inductor: Any) -> None:
    """Sizes of the returned logits are those of the batch at hand, not of the one that was traced."""
    model = WithLogits(Block(dropout=0.5), loss=LOSSES["every second token"])
    compiled = torch.compile(model, backend="sparselora", options={"preset": "exact"}, dynamic=True)
    for length in (6, 10, 14):
        ids, labels = tokens(rows=3, length=length, seed=length)
        torch.manual_seed(0)
        loss, logits = compiled(ids, labels)
        torch.manual_seed(0)
        expected_loss, expected = model(ids, labels)
        assert_close_rms(loss, expected_loss)
        assert logits.shape == expected.shape
        computed = ~logits.isnan().any(-1)
        assert computed.any() and not computed.all()
        assert_close_rms(logits[computed], expected[computed])
    assert len(aot_eager_inductor.graphs) == 1


# --- Sites on the segment ---------------------------------------------------------------------------------------------


def test_sites_of_the_last_block(aot_eager_inductor: None) -> None:
    """Sparsity there still equals the oracle: only context tokens were sparse, and the loss reads none of them."""
    model = Fp64Decoder(DecoderConfig(layers=2))
    inputs = batch(61, padding="left")
    sites = {"layers.1.mlp": 0.75, "layers.1.self_attn": 0.5, "layers.0.mlp": 0.5}
    compiled = torch.compile(model, backend="sparselora", options={"layer_sparsity": sites, "strict": True})
    step, kept = sparse_step(model, compiled, inputs)
    assert set(kept) == {"layers.1.self_attn", "layers.0.mlp"}
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)
    mlp = kept | {"layers.1.mlp": torch.arange(12)}
    assert_same_step(step, oracle_step(model, mlp, inputs), torch.float64)


def test_the_last_output_projection_is_not_gathered() -> None:
    model, inputs = Fp64Decoder(DecoderConfig(layers=1)), batch(61)
    captured = capture(model, inputs["input_ids"], inputs["labels"],
                       config=SparseLoRAConfig(layer_sparsity={"self_attn": 0.5}))  # fmt: skip
    run_passes(captured, *ANALYSES, PASS, "insert_predictors", "sparsify_attention")
    assert targets(captured.gm).count("gathered_linear") == 3
    assert "gathered_input_linear" not in targets(captured.gm)
    (plan,) = captured.ctx.facts.plan.sparse_sites
    assert [projection.name for projection in plan.projections] == [f"layers.0.self_attn.{n}_proj" for n in "qkv"]


# --- Where it does not apply ------------------------------------------------------------------------------------------


class HiddenStates(Tail):
    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.body(self.embed(input_ids).cumsum(1))
        return self.loss(self.head(hidden), labels), hidden


class AuxiliaryHead(Tail):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.body(self.embed(input_ids).cumsum(1))
        return self.loss(self.head(hidden), labels) + self.loss(self.head(hidden.flip(-1)), labels)


def targets_of_activations(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), z.argmax(-1).flatten())


DECLINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hidden states are returned": (lambda: HiddenStates(Block()), "returns it for all rows, beside the loss"),
    "two losses": (lambda: AuxiliaryHead(Block()), "2 cross-entropies are in the graph"),
    "no loss": (lambda: Tail(loss=lambda z, y: z.sum() + y.sum()), "no cross-entropy is in the graph"),
    "logits are used twice": (
        lambda: Tail(loss=lambda z, y: causal_loss(z, y) + 1e-3 * z.logsumexp(-1).square().mean()),
        "reads it for all rows",
    ),
    "targets are not hoistable": (lambda: Tail(loss=targets_of_activations), "computed from activations"),
    "a value for each row": (
        lambda: Tail(loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").sum()),
        "a value for each row",
    ),
    "class probabilities": (
        lambda: Tail(loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), z.flatten(0, 1).softmax(-1).detach())),
        "not that of (N, classes) logits",
    ),
    "tokens mixed behind the head": (lambda: Tail(loss=lambda z, y: causal_loss(z.cumsum(1), y)), "cumsum"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str) -> None:
    model, reason = DECLINED[name]
    _, outcome = narrowed(model(), *tokens())
    assert not outcome.changed
    assert len(rejections(outcome)) == 1 and reason in rejections(outcome)[0]


class Mixing(nn.Module):
    """A layer, and then what mixes the tokens of its result."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.layer = mix, lora(8, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer(x))


def convolution(x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), torch.ones(8, 8, 3).double(), padding=1).transpose(1, 2)


STOPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "convolution": (convolution, "transpose"),
    "batch norm": (lambda x: F.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x), "view_as"),
    "roll": (lambda x: x.roll(1, 1), "roll"),
    "softmax over tokens": (lambda x: x.softmax(1), "softmax works across tokens"),
    "mean over tokens": (lambda x: x - x.mean(1, keepdim=True), "one value for several tokens"),
    "norm over tokens": (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm works across tokens"),
    "view across tokens": (lambda x: x.view(x.shape[0], -1, 4).sin().view(x.shape), "puts values of several tokens"),
    "in place": (lambda x: x.mul_(2), "writes into its operand"),
    "position bias": (lambda x: x + torch.arange(x.shape[1]).double()[:, None], "one value for several tokens"),
    "token picked by number": (lambda x: x + x[:, 0, None], "one value for several tokens"),
}


@pytest.mark.parametrize("name", STOPS)
def test_stops_where_rows_are_mixed(name: str) -> None:
    """The head behind it still runs on the rows of the loss, and nothing before it."""
    mix, reason = STOPS[name]
    model = Tail(Mixing(mix))
    captured, outcome = narrowed(model, *tokens())
    assert outcome.changed and outcome.stats["linears"] == 3
    assert any(reason in found for found in rejections(outcome)), rejections(outcome)
    assert targets(captured.gm).count("select_rows") >= 1
    # Plain autograd refuses to write into what an op of several outputs returned; AOTAutograd writes no views.
    check(model, *tokens(), linears=3, compiler=aot_eager if name == "in place" else graph_eager)


# --- Text -------------------------------------------------------------------------------------------------------------


def test_golden() -> None:
    captured, outcome = narrowed(WithLogits(Block(dropout=0.5)), *tokens())
    assert outcome.changed and outcome.stats == {"nodes": outcome.stats["nodes"], "linears": 9, "outputs": 1}
    assert_golden(PASS, render(captured))


class WithComputedLabels(nn.Module):
    """Labels that the graph makes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Head(Block())

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids, torch.where(input_ids < 9, labels, -100))  # type: ignore[no-any-return]


def test_labels_that_the_graph_computes_keep_their_name() -> None:
    """Predictors read the roles from them, by the name that the facts give."""
    captured, outcome = narrowed(WithComputedLabels(), *tokens())
    assert outcome.changed
    roles = captured.ctx.facts.roles
    assert roles is not None and {name for name, _ in roles.labels} <= {node.name for node in captured.gm.graph.nodes}


def test_idempotent() -> None:
    captured, _ = narrowed(WithLogits(Block()), *tokens())
    before = render(captured)
    (select,) = [each for each in PASSES if each.name == PASS]
    assert not select.run(captured.gm, captured.ctx).changed
    assert render(captured) == before


def test_unrelated_graph() -> None:
    captured, outcome = narrowed(nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True))
    assert not outcome.changed and captured.ctx.facts.loss_rows is None


@pytest.mark.parametrize("dynamic", [0, 1])
def test_dynamic_sizes(dynamic: int) -> None:
    ids, labels = tokens(rows=3)
    captured, outcome = narrowed(WithLogits(Block(0.5)), ids, labels, dynamic=((ids, dynamic), (labels, dynamic)))
    assert outcome.changed and captured.ctx.facts.loss_rows is not None
    (output,) = captured.ctx.facts.loss_rows.outputs
    assert [size.is_Symbol for size in output.lead] == [dynamic == 0, dynamic == 1]


# --- Real models ------------------------------------------------------------------------------------------------------


def hugging_face(kind: str) -> nn.Module:
    """A tiny model of `transformers` with soft-capped, scaled or tied logits, or sparse hidden states."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0, "use_cache": False}
    own: dict[str, Any] = {
        "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
        "Cohere": {"logit_scale": 0.25},
        "Llama": {"tie_word_embeddings": True, "mlp_bias": True},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **own)
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", sweep(["Llama", "Gemma2", "Granite", "Cohere"], "Llama"))
def test_hugging_face(kind: str, aot_eager_inductor: Any) -> None:
    model = with_lora(hugging_face(kind), ALL_TARGETS, dropout=0.1).double()
    compiled = torch.compile(model, backend="sparselora", options={"preset": "exact", "strict": True})
    # On the right: eager Gemma 2 gives NaN for a query that sees padding alone.
    inputs = batch(61, padding="right") | {"num_items_in_batch": torch.tensor(9)}
    actual = train_step(model, compiled, inputs, seed=5)
    model.zero_grad()
    assert_same_step(actual, train_step(model, model, inputs, seed=5), torch.float64, tolerance=NORMS_IN_FP32)
    (graph,) = aot_eager_inductor.graphs
    # Taken of the residual stream and of the attention's result; Cohere's feed-forward block runs beside the attention.
    assert targets(graph).count("select_rows") == (3 if kind == "Cohere" else 2)
    model.eval()
    with torch.no_grad():
        assert not compiled(**batch(61)).logits.isnan().any()


NORMS_IN_FP32 = Tolerance(max=1e-4, rms=1e-5, why="norms of transformers compute in fp32 whatever the dtype")


@pytest.mark.slow
def test_through_inductor() -> None:
    """The real compiler on the real op: rows known at run time only, forward and backward, two lengths, one graph."""
    model = with_lora(tiny_llama(layers=1), ALL_TARGETS)
    compiled = torch.compile(model, backend="sparselora", options={"preset": "exact", "strict": True}, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (12, 20):
        inputs = batch(97, length=length, padding="right")
        actual = train_step(model, compiled, inputs)
        logits = compiled(**inputs).logits
        model.zero_grad()
        assert_same_step(actual, train_step(model, model, inputs), torch.float32)
        model.zero_grad()
        has_loss = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100
        assert torch.equal(logits.isnan().all(-1), ~has_loss)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
