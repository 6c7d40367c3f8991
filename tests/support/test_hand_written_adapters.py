"""The support matrix, adapters that people write themselves: however they are spelt, a step is the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapter_rows import SITES
from models import DecoderConfig, Fp64Decoder, LoRALinear, batch, masked_sites
from oracle import Step, assert_same_step, sparse_step, told, train_step
from sparse_compile.reference import masked_dense, output_mask_from_labels

Formula = Callable[["InColumns", Tensor], Tensor]


class InColumns(nn.Module):
    """A frozen layer with A of shape (in, r) and B of shape (r, out)."""

    def __init__(self, layer: LoRALinear, formula: Formula) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_A = nn.Parameter(layer.lora_A.detach().T.contiguous())
        self.lora_B = nn.Parameter(layer.lora_B.detach().T.contiguous())
        self.scale, self.formula = layer.scale, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}


class TorchtuneLinear(nn.Module):
    """Built as torchtune's `LoRALinear`: the frozen weight, a dropout and two linear layers in one module."""

    def __init__(self, layer: LoRALinear, dropout: float = 0.0) -> None:
        super().__init__()
        outputs, inputs = layer.base_layer.weight.shape
        rank = layer.lora_A.shape[0]
        self.weight, self.scaling, self.disabled = layer.base_layer.weight, layer.scale, False
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)
        self.lora_a.weight, self.lora_b.weight = (nn.Parameter(each.detach()) for each in (layer.lora_A, layer.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        if self.disabled:
            return out
        return out + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_a.weight, "lora_B": self.lora_b.weight}


@dataclass(frozen=True)
class SpellingRow:
    """A way to write an adapter.

    Attributes:
        title: what the page calls it.
        build: returns the layer, of one that PEFT would have made.
        scale: of the adapter.
        transposed: whether its factors are stored as (in, r) and (r, out).
    """

    title: str
    build: Callable[[LoRALinear], nn.Module]
    scale: float = 2.0
    transposed: bool = True


def written(formula: Formula) -> Callable[[LoRALinear], nn.Module]:
    return lambda layer: InColumns(layer, formula)


SPELLINGS: dict[str, SpellingRow] = {
    "x_a_b": SpellingRow(
        "hand-written, `base(x) + x @ A @ B`",
        written(lambda layer, x: layer.base_layer(x) + x @ layer.lora_A @ layer.lora_B),
        scale=1.0,
    ),
    "scaled": SpellingRow(
        "hand-written, `base(x) + (x @ A) @ B * s`",
        written(lambda layer, x: layer.base_layer(x) + (x @ layer.lora_A) @ layer.lora_B * layer.scale),
    ),
    "in_place": SpellingRow(
        "hand-written, `base(x).add_(s * torch.matmul(torch.matmul(x, A), B))`",
        written(
            lambda layer, x: layer.base_layer(x).add_(
                layer.scale * torch.matmul(torch.matmul(x, layer.lora_A), layer.lora_B)
            )
        ),
    ),
    "divided": SpellingRow(
        "hand-written, `base(x) + x @ A @ B / n`",
        written(lambda layer, x: layer.base_layer(x) + x @ layer.lora_A @ layer.lora_B / 3),
        scale=1 / 3,
    ),
    "alpha": SpellingRow(
        "hand-written, `torch.add(base(x), x @ A @ B, alpha=s)`",
        written(lambda layer, x: torch.add(layer.base_layer(x), x @ layer.lora_A @ layer.lora_B, alpha=layer.scale)),
    ),
    "einsum": SpellingRow(
        'hand-written, `base(x) + s * einsum("bsr,ro->bso", einsum("bsi,ir->bsr", x, A), B)`',
        written(
            lambda layer, x: (
                layer.base_layer(x)
                + torch.einsum("bsr,ro->bso", torch.einsum("bsi,ir->bsr", x, layer.lora_A), layer.lora_B) * layer.scale
            )
        ),
    ),
    "torchtune": SpellingRow("layers built as torchtune's `LoRALinear`", TorchtuneLinear, transposed=False),
}


def respelt(model: nn.Module, row: SpellingRow) -> nn.Module:
    """Replace every adapted layer by the same one in another spelling."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, row.build(layer))
    return model


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_trains_as_the_oracle_says(name: str, eager_inductor: Any) -> None:
    row, inputs = SPELLINGS[name], batch(61, padding="right")
    config = DecoderConfig(layers=1, scale=row.scale)
    model, twin = respelt(Fp64Decoder(config), row).train(), Fp64Decoder(config).train()
    options = {"preset": "none", "layer_sparsity": SITES, "strict": True}
    with told() as messages:
        step, kept = sparse_step(model, torch.compile(model, backend="sparselora", options=options), inputs)
    assert messages == [] and eager_inductor.sparse == [True] and len(kept) == len(SITES)
    with masked_dense(masked_sites(twin, kept), output_mask_from_labels(inputs["labels"])):
        expected = train_step(twin, twin, inputs)
    assert_same_step(with_names_of_the_twin(model, row, step), expected, torch.float64)


def with_names_of_the_twin(model: nn.Module, row: SpellingRow, step: Step) -> Step:
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    gradients = {}
    for name, layer in model.named_modules():
        for factor, parameter in layer.factors().items() if hasattr(layer, "factors") else ():
            gradient = step.gradients[paths[id(parameter)]]
            gradients[f"{name}.{factor}"] = gradient.T if row.transposed else gradient
    assert len(gradients) == len(step.gradients)
    return Step(step.loss, gradients)
