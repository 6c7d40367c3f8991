"""A training step with a recipe's maps against the oracle: loss and gradient of every trained parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoder
from graphs import targets
from mapped import mapped_step, random_recipe
from models import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    BATCHES,
    DecoderConfig,
    Fp64Decoder,
    batch,
    fp64_decoder,
    tiny_llama,
    variants,
    with_lora,
)
from oracle import Step, assert_differs, assert_same_step, train_step
from sparse_compile import Recipe, Schedule, explain, token_roles
from sweeps import slow, sweep
from tolerances import Tolerance

pytestmark = pytest.mark.usefixtures("eager_inductor")

VARIANTS = variants(DecoderConfig(layers=2))
WIDTH = DecoderConfig().hidden
RANKS = {"layers.0.mlp": 3, "layers.1.mlp": 5}
RECIPE = random_recipe(WIDTH, RANKS)
HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")


def compiled(
    model: nn.Module, recipe: Recipe | str = RECIPE, *, dynamic: bool = False, **options: Any
) -> Callable[..., Any]:
    options = {"preset": "none", "strict": True, "recipe": recipe, **options}
    return torch.compile(model, backend="sparselora", dynamic=dynamic, options=options)


def masked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that always has an attention mask: ragged and padded batches share a graph."""
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}


def assert_bit_equal(actual: Step, expected: Step) -> None:
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(actual.gradients[name], each) for name, each in expected.gradients.items())


# --- Models that stay in fp64 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sweep(VARIANTS, "ungated"))
def test_every_batch_equals_the_oracle(variant: str) -> None:
    model = Fp64Decoder(VARIANTS[variant])
    call = compiled(model)
    for kind, shape in BATCHES.items():
        inputs = batch(61, **shape)
        inputs = inputs if kind == "packed" else masked(inputs)
        step = train_step(model, call, inputs)
        assert_same_step(step, mapped_step(model, RECIPE, inputs), torch.float64, what=kind)
    assert_differs(step, train_step(model, model, inputs))


@pytest.mark.parametrize(
    ("rank", "gradient"),
    [(0, "exact"), (1, "detached"), *(slow(*each) for each in ((0, "detached"), (1, "exact"), (WIDTH + 3, "exact")))],
)
def test_every_rank_and_gradient_equals_the_oracle(rank: int, gradient: str) -> None:
    model, inputs = fp64_decoder(layers=3, bias=True), batch(61, padding="left")
    recipe = random_recipe(WIDTH, {"layers.0.mlp": rank, "layers.1.mlp": rank})
    step = train_step(model, compiled(model, recipe, surrogate_gradient=gradient), inputs)
    expected = {each: mapped_step(model, recipe, inputs, detached=each == "detached") for each in ("exact", "detached")}
    assert_same_step(step, expected[gradient], torch.float64)
    if rank:
        first = "layers.0.self_attn.o_proj.lora_B"
        exact, detached = (each.gradients[first] for each in expected.values())
        assert (exact - detached).norm() > 0.01 * exact.norm(), "the two gradients differ, or the test says nothing"


@pytest.mark.parametrize(
    ("preset", "rank", "gradient"),
    [("exact", 3, "exact"), slow("none", 3, "exact"), slow("none", 0, "exact"), slow("none", 3, "detached")],
)
def test_through_aot_autograd(preset: str, rank: int, gradient: str, aot_eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61, padding="left")
    recipe = random_recipe(WIDTH, dict.fromkeys(RANKS, rank))
    expected = mapped_step(model, recipe, inputs, detached=gradient == "detached")
    step = train_step(model, compiled(model, recipe, preset=preset, surrogate_gradient=gradient), inputs)
    assert_same_step(step, expected, torch.float64)
    assert aot_eager_inductor.sparse == [True]


@pytest.mark.parametrize("adapters", [("q_proj",), slow(("down_proj",)), slow(("gate_proj", "o_proj"))], ids=str)
def test_blocks_with_few_adapters(adapters: tuple[str, ...]) -> None:
    model, inputs = fp64_decoder(layers=2, adapters=adapters, bias=True), batch(61, padding="left")
    assert_same_step(train_step(model, compiled(model), inputs), mapped_step(model, RECIPE, inputs), torch.float64)


def test_every_length_and_split_runs_one_graph(eager_inductor: Any) -> None:
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
        assert_same_step(
            train_step(model, call, inputs), mapped_step(model, RECIPE, inputs), torch.float64, what=str(shape)
        )
    assert len(eager_inductor.graphs) == 1 and eager_inductor.sparse == [True]


def test_the_dense_phase_and_evaluation_are_dense(eager_inductor: Any) -> None:
    model, inputs, schedule = fp64_decoder(layers=2), batch(61), Schedule()
    call = compiled(model, start_step=1, end_step=2, schedule=schedule)
    dense, sparse = train_step(model, model, inputs), mapped_step(model, RECIPE, inputs)
    for step, expected in ((0, dense), (1, sparse), (2, dense), (1, sparse)):
        schedule.step = step
        assert_same_step(train_step(model, call, inputs), expected, torch.float64, what=f"step {step}")
    assert len(eager_inductor.graphs) == 1, "a change of phase compiles nothing"
    with torch.no_grad():
        torch.testing.assert_close(call(**inputs), model(**inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "layers"), [("left", 2), slow("packed", 2), slow("left", 3), slow("packed", 3)])
def test_exact_optimisations_run_beside_maps(kind: str, layers: int) -> None:
    """The last block's site runs on the rows of the loss alone: it leaves the plan, and its map changes nothing."""
    model, inputs = fp64_decoder(layers=layers), batch(61, **BATCHES[kind])
    recipe = random_recipe(WIDTH, {f"layers.{layer}.mlp": 3 + layer for layer in range(layers)})
    step = train_step(model, compiled(model, recipe, preset="exact"), inputs)
    assert_same_step(step, mapped_step(model, recipe, inputs), torch.float64)
    providers = [
        site.provider
        for site in explain(model, **inputs, config={"preset": "exact", "recipe": recipe}).sites
        if site.kind == "ffn"
    ]
    assert providers == [*(f"map of rank {3 + layer}" for layer in range(layers - 1)), "loss_rows"]


@pytest.mark.parametrize(
    ("slots", "rank"),
    [("token_bucket", 3), slow("token_capacity", 0), slow("token_bucket", 0)],
)
def test_graphs_of_fixed_sizes(slots: str, rank: int, eager_inductor: Any) -> None:
    model = fp64_decoder(layers=3)
    recipe = random_recipe(WIDTH, dict.fromkeys(RANKS, rank))
    call = compiled(model, recipe, preset="exact", **{slots: 24})
    for prompts in ([9, 9, 9], [16, 13, 14], [16, 16, 15]):
        inputs = batch(61, prompts=prompts)
        with token_roles(labels=inputs["labels"]):
            step = train_step(model, call, inputs)
        assert_same_step(step, mapped_step(model, recipe, inputs), torch.float64, what=str(prompts))
    assert len(eager_inductor.graphs) == 1 and "token_slots" in targets(eager_inductor.graphs[0])


def test_roles_may_be_given_from_outside() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    mask = torch.rand(inputs["labels"].shape, generator=torch.Generator().manual_seed(1)) < 0.5
    with token_roles(output_mask=mask):
        step = train_step(model, compiled(model), inputs)
    assert_same_step(step, mapped_step(model, RECIPE, inputs, output_mask=mask), torch.float64)


class CheckpointedLayer(decoder.DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return checkpoint(super().forward, x, cos, sin, mask, use_reentrant=False)


@pytest.mark.parametrize("rank", [3, slow(0)])
def test_checkpointed_layers(rank: int, monkeypatch: pytest.MonkeyPatch, aot_eager_inductor: Any) -> None:
    monkeypatch.setattr(decoder, "DecoderLayer", CheckpointedLayer)
    model, inputs = fp64_decoder(layers=2), batch(61, padding="left")
    recipe = random_recipe(WIDTH, dict.fromkeys(RANKS, rank))
    step = train_step(model, compiled(model, recipe), inputs)
    assert_same_step(step, mapped_step(model, recipe, inputs), torch.float64)
    assert aot_eager_inductor.sparse == [True]


# --- Hugging Face and PEFT --------------------------------------------------------------------------------------------

LLAMA = random_recipe(64, {"layers.0.mlp": 3, "layers.1.mlp": 0})


def test_llama_with_peft() -> None:
    model = with_lora(tiny_llama(layers=2, dtype=torch.float64), ATTENTION_TARGETS)
    call = compiled(model, LLAMA)
    for kind in ("ragged", "left", "right"):
        inputs = masked(batch(97, **BATCHES[kind]))
        step = train_step(model, call, inputs)
        assert_same_step(step, mapped_step(model, LLAMA, inputs), torch.float64, tolerance=HF_FP64, what=kind)


@pytest.mark.slow
def test_dropout_and_dora_inside_a_mapped_block() -> None:
    """Dropout in front of gate and up draws for all tokens, as the eager model does: one seed gives one result."""
    for dora in (False, True):
        llama = tiny_llama(layers=2, dtype=torch.float64)
        model = with_lora(llama, (*ATTENTION_TARGETS, "gate_proj", "up_proj"), dropout=0.3, dora=dora)
        inputs, call = batch(97), compiled(model, LLAMA)
        step = train_step(model, call, inputs, seed=5)
        expected = mapped_step(model, LLAMA, inputs, seed=5)
        assert_same_step(step, expected, torch.float64, tolerance=HF_FP64, what=f"dora={dora}")


BF16 = Tolerance(max=0.16, rms=3e-2, why="twice the table's, for sqrt(40) roundings instead of sqrt(10)")


@pytest.mark.parametrize(
    ("where", "rank"), [("stored in bf16", 3), ("autocast", 0), slow("stored in bf16", 0), slow("autocast", 3)]
)
def test_narrow_types(where: str, rank: int, eager_inductor: Any) -> None:
    """A base in bf16 with fp32 adapters, and autocast around fp32: a constant has no product that would cast it."""
    autocast = where == "autocast"
    model = with_lora(tiny_llama(layers=2, dtype=torch.float32 if autocast else torch.bfloat16), ALL_TARGETS)
    recipe = random_recipe(64, dict.fromkeys(RANKS, rank))
    inputs = batch(97, padding="right")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step = train_step(model, compiled(model, recipe), inputs)
        expected = mapped_step(model, recipe, inputs)
    assert {gradient.dtype for gradient in step.gradients.values()} == {torch.float32}
    assert_same_step(step, expected, torch.bfloat16, tolerance=BF16)
    assert eager_inductor.sparse == [True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_in_4_bits(dtype: torch.dtype, aot_eager_inductor: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from four_bit import pair

    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(dtype=dtype))
    inputs = batch(97, padding="right")
    step = train_step(model, compiled(model, LLAMA), inputs)
    wide = {"tolerance": BF16} if dtype == torch.bfloat16 else {}
    assert_same_step(step, mapped_step(twin, LLAMA, inputs), dtype, **wide)
    assert aot_eager_inductor.sparse == [True]
