"""Recipes of random maps, and the oracle of a training step with a recipe's maps in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models import Kept, masked_sites
from oracle import Step, train_step
from sparse_compile import Recipe
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import MappedFFN, masked_dense, output_mask_from_labels


def random_map(width: int, rank: int, seed: int = 0, out: int | None = None) -> AffineMap:
    """A map that is large enough to change every gradient by far."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, width), (out or width, rank), (out or width,))
    return AffineMap(*(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def random_recipe(width: int, ranks: Mapping[str, int]) -> Recipe:
    """Maps of the ranks given, by site name."""
    maps = (random_map(width, rank, seed) for seed, rank in enumerate(ranks.values()))
    return Recipe({name: SiteRecipe(each) for name, each in zip(ranks, maps, strict=True)})


def mapped_sites(model: nn.Module, recipe: Recipe, *, detached: bool = False) -> list[MappedFFN]:
    """Describe the maps of a recipe to the oracle, by name suffix, in the dtype of the frozen weights."""
    modules = dict(model.named_modules())
    sites = []
    for suffix, site in recipe.sites.items():
        if site.surrogate is None:
            continue
        (block,) = (module for name, module in modules.items() if f".{name}".endswith(f".{suffix}"))
        first = block.up_proj if getattr(block, "gate_proj", None) is None else block.gate_proj
        weight = getattr(block.down_proj, "base_layer", block.down_proj).weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        parts = (getattr(site.surrogate, part).to(dtype) for part in ("q", "u", "bias"))
        sites.append(MappedFFN(first, block.down_proj, *parts, detached))
    return sites


def mapped_step(
    model: nn.Module,
    recipe: Recipe,
    inputs: Mapping[str, Tensor],
    *,
    detached: bool = False,
    seed: int | None = None,
    kept: Kept | None = None,
    output_mask: Tensor | None = None,
    call: Callable[..., Any] | None = None,
) -> Step:
    """Run the step of the eager model with a recipe's maps, and with the channels given at sites that have none."""
    sites: Sequence[Any] = [*mapped_sites(model, recipe, detached=detached), *masked_sites(model, kept or {})]
    mask = output_mask_from_labels(inputs["labels"]) if output_mask is None else output_mask
    with masked_dense(sites, mask):
        return train_step(model, call or model, inputs, seed)
