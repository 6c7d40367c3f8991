"""A training step with a recipe's maps against the oracle: loss and gradient of every trained parameter, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import DecoderConfig, Fp64Decoder, batch, variants
from oracle import assert_differs, assert_same_step, train_step
from sparse_compile import Recipe
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import MappedFFN, masked_dense, output_mask_from_labels
from sweeps import sweep

pytestmark = pytest.mark.usefixtures("eager_inductor")

VARIANTS = variants(DecoderConfig(layers=2))
VOCAB = DecoderConfig().vocab
RANKS = {"layers.0.mlp": 3, "layers.1.mlp": 5}


def random_map(width: int, rank: int, seed: int) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, width), (width, rank), (width,))
    return AffineMap(*(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def random_recipe(model: nn.Module, ranks: dict[str, int] = RANKS) -> Recipe:
    width = model.config.hidden
    sites = {name: SiteRecipe(random_map(width, rank, seed)) for seed, (name, rank) in enumerate(ranks.items())}
    return Recipe(sites)


def mapped_sites(model: nn.Module, recipe: Recipe, *, detached: bool = False) -> list[MappedFFN]:
    modules = dict(model.named_modules())
    sites = []
    for name, site in recipe.sites.items():
        block, each = modules[name], site.surrogate
        first = block.up_proj if getattr(block, "gate_proj", None) is None else block.gate_proj
        sites.append(MappedFFN(first, block.down_proj, each.q, each.u, each.bias, detached))
    return sites


def check(config: DecoderConfig, recipe: Recipe | None = None, inputs: Any = None, **options: Any) -> None:
    model: Fp64Decoder = Fp64Decoder(config)
    recipe, inputs = recipe or random_recipe(model), inputs or batch(VOCAB)
    dense = train_step(model, model, inputs)
    detached = options.get("surrogate_gradient") == "detached"
    with masked_dense(mapped_sites(model, recipe, detached=detached), output_mask_from_labels(inputs["labels"])):
        expected = train_step(model, model, inputs)
    assert_differs(expected, dense)
    options = {"preset": "none", "strict": True, "recipe": recipe, **options}
    call = torch.compile(model, backend="sparselora", dynamic=False, options=options)
    assert_same_step(train_step(model, call, inputs), expected, torch.float64)


@pytest.mark.parametrize("variant", sweep(VARIANTS, "gqa", "ungated"))
def test_loss_and_gradients_are_those_of_the_oracle(variant: str) -> None:
    check(VARIANTS[variant])
