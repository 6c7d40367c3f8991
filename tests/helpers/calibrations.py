"""Calibrate tiny models whose blocks are easy or hard to map, and hold the result against the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exited import context_exit
from mapped import mapped_sites
from models import batch, fp64_decoder
from sparse_compile import Recipe
from sparse_compile.calibration.calibrate import Calibration, calibrate
from sparse_compile.calibration.losses import held_out_loss
from sparse_compile.reference import masked_dense, output_mask_from_labels

Batches = Sequence[Mapping[str, Tensor]]


def nearly_linear(x: Tensor) -> Tensor:
    return x + 0.3 * x.tanh()


def blocks_near_a_map(layers: int = 3) -> nn.Module:
    """A decoder whose blocks a map of their width all but equals, and a narrow one does not."""
    return fp64_decoder(layers=layers, gated=False, region=nearly_linear, bias=True)


@torch.no_grad()
def batches_of(model: nn.Module, count: int = 6, vocab: int = 61, **shape: Any) -> list[dict[str, Tensor]]:
    """Batches whose labels are what the model predicts: whatever changes the model, its loss rises."""
    found = []
    for seed in range(count):
        inputs = batch(vocab, **{"rows": 6, "length": 24, "seed": seed, **shape})
        predicted = model(**inputs)[1].argmax(-1).roll(1, 1)
        inputs["labels"] = torch.where(inputs["labels"] == -100, -100, predicted)
        found.append(inputs)
    return found


STAYING = {"context_exit": 1.0}
"""Options with which no exit is tried."""


def run(model: nn.Module, batches: Batches, **arguments: Any) -> Calibration:
    """Calibrate for a budget that everything meets and without an exit, unless something else is given."""
    goal = {} if arguments.keys() & {"speedup", "flops"} else {"loss_budget": 100.0}
    return calibrate(model, batches, progress=False, **{"ranks": (4, 32), "config": STAYING, **goal, **arguments})


def oracle_loss(model: nn.Module, recipe: Recipe, batches: Batches) -> float:
    """Loss of the eager model over the batches that a calibration holds out."""
    sites = recipe_sites(model, recipe)

    @torch.no_grad()
    def call(inputs: Mapping[str, Tensor]) -> Any:
        with masked_dense(sites, output_mask_from_labels(inputs["labels"])):
            return model(**inputs)

    return held_out_loss(call, [each for place, each in enumerate(batches) if place % 4 == 1])


def recipe_sites(model: nn.Module, recipe: Recipe) -> list[Any]:
    """Describe the maps of a recipe and its exit to the oracle."""
    sites: list[Any] = list(mapped_sites(model, recipe))
    if recipe.exit is not None:
        block = int(recipe.exit.site.split("layers.")[1].split(".")[0])
        maps = {name: each.surrogate for name, each in recipe.exit.maps.items() if each.surrogate is not None}
        sites.append(context_exit(model, maps, block))
    return sites
