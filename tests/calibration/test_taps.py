"""A tapped model against the eager one: what it returns, what it hands on, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoder
from mapped import mapped_sites, random_recipe
from models import ALL_TARGETS, ATTENTION_TARGETS, BATCHES, batch, fp64_decoder, tiny_llama, with_lora
from sparse_compile import Recipe, SparseLoRAConfig
from sparse_compile.calibration.losses import held_out_loss
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import slow, sweep
from tolerances import TOLERANCES, Tolerance, assert_close_rms

RANKS = {"layers.0.mlp": 3, "layers.1.mlp": 0}


def llama(dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ALL_TARGETS) -> nn.Module:
    return with_lora(tiny_llama(layers=2, dtype=dtype), targets, dropout=0.3)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "decoder": (lambda: fp64_decoder(layers=2), 61, 32),
    "ungated": (lambda: fp64_decoder(layers=2, gated=False, region=nn.functional.gelu, bias=True), 61, 32),
    "llama": (llama, 97, 64),
    "llama in bf16": (lambda: llama(torch.bfloat16, ATTENTION_TARGETS), 97, 64),
    "llama in bf16, wider adapters": (lambda: llama(torch.bfloat16), 97, 64),
}
"""How each is made, its vocabulary and its width."""


def tapped(model: nn.Module, **options: Any) -> TappedModel:
    return TappedModel(model, SparseLoRAConfig(**options))


def returned(outputs: Any) -> tuple[Tensor, Tensor]:
    return outputs if isinstance(outputs, tuple) else (outputs.loss, outputs.logits)


@torch.no_grad()
def evaluated(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    try:
        return returned(model.eval()(**inputs))
    finally:
        model.train()


def put(run: TappedModel, recipe: Recipe) -> None:
    by_suffix = {name: site.surrogate for name, site in recipe.sites.items() if site.surrogate is not None}
    run.put({name: each for name in run.taps for suffix, each in by_suffix.items() if name.endswith(suffix)})


# --- What it returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sweep(MODELS, "decoder"))
def test_without_maps_it_returns_what_the_model_returns(kind: str) -> None:
    model, vocab = MODELS[kind][0](), MODELS[kind][1]
    run = tapped(model)
    for shape in BATCHES.values():
        inputs = batch(vocab, **shape)
        for found, expected in zip(returned(run(inputs)), evaluated(model, inputs), strict=True):
            assert torch.equal(found, expected)
    assert [name.split("layers.")[1] for name in run.taps] == ["0.mlp", "1.mlp"] and run.declined == {}


@pytest.mark.parametrize("kind", sweep(MODELS, "decoder"))
def test_with_maps_it_returns_what_the_oracle_returns(kind: str) -> None:
    make, vocab, width = MODELS[kind]
    model, recipe = make(), random_recipe(width, RANKS)
    run, dense = tapped(model), []
    for shape in BATCHES.values():
        inputs = batch(vocab, **shape)
        dense.append(returned(run(inputs))[0])
        put(run, recipe)
        loss, logits = returned(run(inputs))
        run.put({})
        with masked_dense(mapped_sites(model, recipe), output_mask_from_labels(inputs["labels"])):
            expected = evaluated(model, inputs)
        dtype = next(model.parameters()).dtype
        tolerance = TOLERANCES[dtype]
        if dtype == torch.bfloat16:
            # Where adapters widen the block, the tap rounds no map to bf16, as the oracle does.
            tolerance = Tolerance(max=0.16, rms=3e-2, why="twice the table's, for sqrt(40) roundings")
        assert_close_rms(loss, expected[0], tolerance=tolerance)
        assert_close_rms(logits, expected[1], tolerance=tolerance)
        assert abs(float(loss - dense[-1])) > 1e-3
        assert torch.equal(returned(run(inputs))[0], dense[-1]), "what is put is taken away again"


def test_one_site_alone_gets_its_map() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    run, recipe = tapped(model), random_recipe(32, {"layers.0.mlp": 4})
    run(inputs)
    put(run, recipe)
    with masked_dense(mapped_sites(model, recipe), output_mask_from_labels(inputs["labels"])):
        expected = evaluated(model, inputs)
    assert_close_rms(run(inputs)[0], expected[0])


@pytest.mark.parametrize("kind", ["decoder", slow("llama")])
def test_a_model_that_checkpoints_its_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class CheckpointedLayer(decoder.DecoderLayer):
        def forward(self, *args: Any) -> Tensor:
            return checkpoint(super().forward, *args, use_reentrant=False)  # type: ignore[no-any-return]

    monkeypatch.setattr(decoder, "DecoderLayer", CheckpointedLayer)
    model = MODELS[kind][0]()
    if kind == "llama":
        model.gradient_checkpointing_enable()
    inputs = batch(MODELS[kind][1], padding="left")
    run = tapped(model)
    assert torch.equal(returned(run(inputs))[0], evaluated(model, inputs)[0])
    assert len(run.taps) == 2
    model.train()


# --- What it hands on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("decoder", "left"),
        ("llama", "packed"),
        *(slow("decoder", shape) for shape in ("ragged", "right", "other lengths")),
        *(slow("llama", shape) for shape in ("ragged", "left", "right", "other lengths")),
    ],
)
def test_rows_are_those_of_context_tokens_without_padding(kind: str, shape: str) -> None:
    make, vocab, _ = MODELS[kind]
    model = make()
    run, rows, expected = tapped(model), {}, {}
    first = batch(vocab, **BATCHES.get(shape, {}))
    run(first)
    run.collect({name: lambda x, y, name=name: rows.setdefault(name, []).append((x, y)) for name in run.taps})
    for inputs in (first, batch(vocab, rows=2, length=23) if shape == "other lengths" else first):
        scored = ~output_mask_from_labels(inputs["labels"])
        if "attention_mask" in inputs:
            scored &= inputs["attention_mask"].bool()
        assert scored.any() and not scored.all()
        for name, x, y in hooked(model, run, inputs):
            expected.setdefault(name, []).append((x[scored], y[scored]))
        run(inputs)
    assert rows.keys() == expected.keys() == run.taps.keys()
    for name, pairs in expected.items():
        for found, wanted in zip(rows[name], pairs, strict=True):
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    run.collect({})
    run(first)
    assert {len(each) for each in rows.values()} == {2}


def hooked(model: nn.Module, run: TappedModel, inputs: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """What each block reads and returns in an evaluation of the eager model."""
    found: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: found.append((name, args[0], output))
        )
        for name in run.taps
    ]
    evaluated(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def test_rows_behind_a_map_are_those_of_the_model_with_the_map() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    run, recipe, rows = tapped(model), random_recipe(32, {"layers.0.mlp": 4}), []
    run(inputs)
    put(run, recipe)
    run.collect({"layers.1.mlp": lambda x, y: rows.append(x), "layers.0.mlp": lambda x, y: rows.append(y)})
    run(inputs)
    mask = output_mask_from_labels(inputs["labels"])
    with masked_dense(mapped_sites(model, recipe), mask):
        (_, _, _), (_, x, _) = hooked(model, run, inputs)
    (_, _, y), _ = hooked(model, run, inputs)
    # A site's own rows are those of the block, never of the map in its place.
    assert torch.equal(rows[0], y[~mask])
    assert_close_rms(rows[1], x[~mask])


# --- What it leaves alone ---------------------------------------------------------------------------------------------


def test_modes_gradients_generators_and_weights_stay_as_they_are() -> None:
    model, inputs = llama(), batch(97)
    model.base_model.model.model.layers[0].eval()
    model(**inputs).loss.backward()
    modes = {name: module.training for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    generator = torch.get_rng_state()
    run = tapped(model)
    loss = run(inputs).loss
    assert not loss.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == values.keys() and gradients
    assert all(torch.equal(model.get_parameter(name).grad, each) for name, each in gradients.items())


def test_modes_come_back_after_an_error() -> None:
    model = fp64_decoder(layers=1)
    with pytest.raises(TypeError):
        tapped(model)({"nothing": torch.zeros(1)})
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_stays_compiled(in_place: bool, eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    expected = evaluated(model, inputs)[0]
    options = {"layer_sparsity": {"mlp": 0.5}, "preset": "none"}
    call = model
    if in_place:
        model.compile(backend="sparselora", options=options)
    else:
        call = torch.compile(model, backend="sparselora", options=options)
    before = call(**inputs)[0].detach() if in_place else None
    run = tapped(call)
    assert torch.equal(run(inputs)[0], expected)
    assert list(run.taps) == ["layers.0.mlp", "layers.1.mlp"]
    after = call(**inputs)[0]
    assert before is None or torch.equal(after, before)
    assert not torch.equal(after, expected)
    assert len(eager_inductor.graphs) == 1, "nothing is compiled again"


# --- What has no tap --------------------------------------------------------------------------------------------------


def test_a_model_whose_roles_are_unknown_has_no_taps() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    del inputs["labels"]
    run = tapped(model)
    assert torch.equal(run(inputs)[1], evaluated(model, inputs)[1])
    assert run.taps == {} and set(run.declined) == {"layers.0.mlp", "layers.1.mlp"}
    assert all("output tokens" in reason for reason in run.declined.values())


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_a_loss_counts_each_token_once() -> None:
    model = fp64_decoder(layers=1)
    batches = [batch(61, rows=rows, length=length, seed=rows) for rows, length in ((1, 9), (3, 16), (5, 30))]
    sums = [evaluated(model, each)[0] * (each["labels"][:, 1:] != -100).sum() for each in batches]
    tokens = sum((each["labels"][:, 1:] != -100).sum() for each in batches)
    found = held_out_loss(lambda each: evaluated(model, each), batches)
    assert found == pytest.approx(float(sum(sums) / tokens), rel=1e-12)


@pytest.mark.parametrize("as_returned", [lambda x: x, lambda x: (x, None), lambda x: {"loss": x}], ids=["", "(", "{"])
def test_every_form_of_a_loss_is_read(as_returned: Callable[[Tensor], Any]) -> None:
    batches = [{"labels": torch.tensor([[0, 1, -100]])}, {"labels": torch.tensor([[0, 1, 2]])}, {"labels": None}]
    losses = iter([2.0, 5.0, 4.0])
    found = held_out_loss(lambda _: as_returned(torch.tensor(next(losses))), batches)
    assert found == pytest.approx((2 + 2 * 5 + 4) / 4)


@pytest.mark.parametrize("ignored", [-100, 7])
def test_ignored_labels_count_nothing(ignored: int) -> None:
    batches = [{"labels": torch.tensor([[0, 1, ignored, ignored]])}, {"labels": torch.tensor([[0, 1, 2, ignored]])}]
    losses = iter([3.0, 6.0])
    assert held_out_loss(lambda _: torch.tensor(next(losses)), batches, ignore_index=ignored) == pytest.approx(5)


@pytest.mark.parametrize("value", [None, (None, torch.zeros(3)), {"logits": 1}, torch.zeros(3), 2.0])
def test_what_is_no_loss_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="no loss"):
        held_out_loss(lambda _: value, [{}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        held_out_loss(lambda _: torch.tensor(value), [{}])


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out batch has a label"):
        held_out_loss(lambda _: torch.tensor(0.0), [{"labels": torch.full((2, 5), -100)}])
