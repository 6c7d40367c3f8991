"""Calibrations that cannot be: what is left out with a reason, and what is refused at once."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrations import batches_of, run
from models import batch, fp64_decoder
from sparse_compile import SparseLoRAConfig
from sparse_compile.calibration.losses import batch_loss


def test_a_site_whose_activations_overflow_is_declined_and_the_others_are_not() -> None:
    model = fp64_decoder(layers=2)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.base_layer.weight.mul_(1e200)
    found = run(model, [batch(61, seed=seed) for seed in range(6)])
    assert set(found.declined) == {"layers.0.mlp"} and "NaN or infinity" in found.declined["layers.0.mlp"]
    assert [site.name for site in found.sites] == ["layers.1.mlp"] and "layers.0.mlp: act" in str(found)


def test_a_model_without_frozen_blocks_is_refused() -> None:
    model = fp64_decoder(layers=2).requires_grad_(True)
    with pytest.raises(ValueError, match="no feed-forward block of frozen layers"):
        run(model, batches_of(model))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.base_layer.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="loss of a batch is nan"):
        run(model, batches)
    assert model.training


def first_alone(labels: Tensor) -> Tensor:
    """Labels of the first token alone, which no token predicts."""
    return torch.cat([torch.ones_like(labels[:, :1]), torch.full_like(labels[:, 1:], -100)], dim=1)


def all_padding(inputs: Any) -> dict[str, Tensor]:
    labels = torch.full_like(inputs["labels"], -100)
    return {**inputs, "labels": labels, "attention_mask": torch.zeros_like(labels)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda each: {**each, "labels": each["input_ids"]}, "no context token"),
        (lambda each: {"input_ids": each["input_ids"]}, "no loss"),
        (lambda each: {**each, "labels": torch.full_like(each["labels"], -100)}, "label that the loss counts.* got 0"),
        (lambda each: {**each, "labels": first_alone(each["labels"])}, "label that the loss counts.* got 0"),
        (lambda each: {**each, "attention_mask": (each["labels"] != -100).long()}, "no context token"),
        (all_padding, "label that the loss counts.* got 0"),
    ],
    ids=["no context", "no labels", "no label that counts", "a label nothing predicts", "padded context", "padding"],
)
def test_batches_that_say_nothing_are_refused(change: Any, reason: str) -> None:
    model = fp64_decoder(layers=1)
    with pytest.raises(ValueError, match=reason):
        run(model, [change(each) for each in batches_of(model)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batches": []}, "at least 2 batches.* got 0"),
        ({"batches": [batch(61)]}, "at least 2 batches.* got 1"),
        ({"loss_budget": -0.1}, "loss_budget"),
        ({"speedup": 2.0, "flops": 0.5}, "one goal, and speedup and flops are two"),
        ({"max_forwards": 31}, "max_forwards"),
        ({"max_forwards": 50.0}, "max_forwards"),
        ({"max_forwards": True}, "max_forwards"),
        ({"ranks": ()}, "ranks"),
        ({"ranks": (8, -1)}, "ranks"),
        ({"ranks": (8.0,)}, "ranks"),
        ({"ranks": (True,)}, "ranks"),
        ({"config": {"ignore": 3}}, "unknown option"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], reason: str) -> None:
    def never(**inputs: Tensor) -> Any:
        raise AssertionError("the model ran")

    model = fp64_decoder(layers=1)
    model.forward = never  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=reason):
        run(model, **{"batches": [batch(61)] * 2, **arguments})


def test_options_are_taken_in_either_form() -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=2)
    first, second = (run(model, batches, config=each) for each in (SparseLoRAConfig(preset="none"), {"preset": "none"}))
    assert first.recipe == second.recipe


def test_batches_without_labels_are_left_out(said: list[str]) -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=4)
    padded = all_padding(batches[0])
    found = run(model, [padded, *batches[:2], padded, *batches[2:]])
    expected = run(model, batches)
    assert found.recipe == expected.recipe and (found.loss, found.tokens) == (expected.loss, expected.tokens)
    assert "2 of 6 batches have no label that the loss counts, and are left out" in said


def test_constant_inputs_get_the_constant() -> None:
    """Every token reads the same: there is no direction to map."""
    model = fp64_decoder(layers=1)
    batches = batches_of(model)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(model.embed_tokens.weight[:1].expand_as(model.embed_tokens.weight))
    found = run(model, batches, ranks=(4, 32))
    (site,) = found.recipe.sites.values()
    assert site.surrogate is not None and site.surrogate.rank == 0
    assert [each.rank for each in found.sites] == [0] and found.rise == pytest.approx(0, abs=1e-9)


def test_a_second_calibration_of_one_model_at_a_time_is_refused() -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=2)
    errors: list[str] = []

    def second(*_: Any) -> None:
        with pytest.raises(ValueError, match="being calibrated already") as caught:
            run(torch.compile(model, backend="eager"), batches)
        errors.append(str(caught.value))

    def in_a_thread(*_: Any) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    other = fp64_decoder(layers=1)
    taps: list[Any] = []

    def meanwhile(call: Any, *arguments: Any) -> tuple[float, float]:
        if not errors:
            second()
            in_a_thread()
        taps[:] = call.taps.values()
        return batch_loss(call, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_compile.calibration.held_out.batch_loss", meanwhile)
        found = run(model, batches)
    assert len(errors) == 2 and len(found.recipe.sites) == 1
    assert run(model, batches).recipe == found.recipe, "afterwards it may be calibrated again"
    assert len(run(other, batches).recipe.sites) == 1


def test_a_calibration_that_fails_does_not_bar_the_next() -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=2)
    with pytest.raises(ValueError, match="no context token"):
        run(model, [{**each, "labels": each["input_ids"]} for each in batches])
    assert len(run(model, batches).recipe.sites) == 1


def test_a_sparse_model_is_calibrated_as_its_eager_self(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    expected = run(model, batches)
    model.compile(backend="sparselora", options={"layer_sparsity": {"mlp": 0.5}, "preset": "none"})
    model(**batches[0])[0].backward()
    graphs = len(eager_inductor.graphs)
    found = run(model, batches)
    assert found.recipe == expected.recipe and found.loss == expected.loss
    assert len(eager_inductor.graphs) == graphs == 1


def test_a_map_that_breaks_the_loss_costs_infinitely_much_and_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp64_decoder(layers=2)
    taps: list[Any] = []

    def broken(call: Any, *arguments: Any) -> tuple[float, float]:
        taps[:] = call.taps.values()
        if taps and taps[0].surrogate is not None:
            raise ValueError("the loss of a batch is nan: nothing can be measured with it")
        return batch_loss(call, *arguments)

    monkeypatch.setattr("sparse_compile.calibration.held_out.batch_loss", broken)
    found = run(model, batches_of(model), loss_budget=100)
    assert [(site.name, site.chosen) for site in found.sites] == [("layers.1.mlp", True), ("layers.0.mlp", False)]
    assert found.sites[1].rise == math.inf and math.isfinite(found.rise)
    assert all(math.isfinite(point.rise) for point in found.curve)
    assert "+inf" in str(found)


def test_where_every_map_breaks_the_loss_the_model_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any, *arguments: Any) -> tuple[float, float]:
        if any(tap.surrogate is not None for tap in call.taps.values()):
            raise ValueError("the loss of a batch is nan: nothing can be measured with it")
        return batch_loss(call, *arguments)

    monkeypatch.setattr("sparse_compile.calibration.held_out.batch_loss", broken)
    model = fp64_decoder(layers=2)
    for goal in ({"loss_budget": 100.0}, {"speedup": 1.05}):
        found = run(model, batches_of(model), **goal)
        assert found.recipe.sites == {} and found.reason == "with maps in place the loss is not finite"
