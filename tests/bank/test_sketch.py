"""Inner products of sketches are those of the adapters, nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from banks import Made, write_adapter
from sparse_compile.bank.adapter import Adapter, open_adapter
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.sketch import sketch_of

SIZES = {f"layers.{i:02}.q": (96, 160) for i in range(12)}


def products(adapter: Adapter) -> Tensor:
    pairs = ((layer.scale, *adapter.factors(name)) for name, layer in adapter.layers.items())
    return torch.cat([(scale * b @ a).flatten() for scale, a, b in pairs])


def test_inner_products_are_kept(tmp_path: Path) -> None:
    """The third adapter is the first one but for a part of its layers."""
    folders = [write_adapter(tmp_path / str(i), 4, seed=i, layers=SIZES) for i in range(2)]
    folders.append(write_adapter(tmp_path / "part", 4, seed=0, layers=dict(list(SIZES.items())[:8])))
    adapters = [open_adapter(folder) for folder in folders]
    whole = torch.zeros(3, 12 * 96 * 160)
    sketched = torch.zeros(3, 12 * 32 * 32)
    for row, adapter in enumerate(adapters):
        of, sketch = products(adapter), torch.cat([each.flatten() for each in sketch_of(adapter).values()])
        whole[row, : len(of)], sketched[row, : len(sketch)] = of, sketch
    exact, found = whole @ whole.t(), sketched @ sketched.t()
    norms = exact.diagonal().sqrt()
    errors = (found - exact) / (norms.unsqueeze(1) * norms)
    assert errors.abs().max() < 0.1
    assert exact[0, 2] / (norms[0] * norms[2]) > 0.75


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(made: Made, value: float) -> None:
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(BankError, match=r"NaN or infinity in model\.layers\.0\.mlp\.up_proj"):
        sketch_of(open_adapter(made(tensors={up: torch.full((2, 8), value)})))
