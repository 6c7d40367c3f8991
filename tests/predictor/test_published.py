"""Factors that a release publishes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from predictor_weights import identical, low_rank_weight, product
from sparse_compile.predictor.published import load_upstream_factors
from sparse_compile.predictor.store import FactorStore
from sparse_compile.predictor.svd import LowRankFactors
from tolerances import assert_close_rms


class TestUpstream:
    LAYER = "model.layers.1.mlp.gate_proj"

    @pytest.fixture
    def weight(self) -> Tensor:
        return low_rank_weight(40, 24, rank=8, dtype=torch.float32)

    @pytest.fixture
    def folder(self, tmp_path: Path, weight: Tensor) -> Path:
        """A release: w1 (in, r) and w2 (r, out), so that x @ w1 @ w2 stands for the layer."""
        left, values, right = torch.linalg.svd(weight.mT, full_matrices=False)
        root = values[:8].sqrt()
        tensors = {f"{self.LAYER}.w1": left[:, :8] * root, f"{self.LAYER}.w2": root[:, None] * right[:8]}
        tensors |= {f"model.layers.11.mlp.gate_proj.{key[-2:]}": tensor * 2 for key, tensor in tensors.items()}
        release = tmp_path / "release"
        release.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, release / "model.safetensors")
        return release

    @pytest.mark.parametrize(
        "name",
        [
            LAYER,
            f"{LAYER}.weight",
            f"base_model.model.{LAYER}.base_layer.weight",
            f"module.base_model.model.{LAYER}.base_layer",
            "_orig_mod.model.layers.1._orig_mod.mlp.gate_proj.weight",
        ],
    )
    def test_published_factors_win(
        self, tmp_path: Path, folder: Path, weight: Tensor, name: str, factorized: list[Tensor]
    ) -> None:
        store = FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder))
        assert_close_rms(product(store.get(name, weight)), weight)
        assert factorized == []
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        "name", ["model.layers.2.mlp.gate_proj", "layers.1.mlp.gate_proj", f"{LAYER}.lora_A.default"]
    )
    def test_other_names_are_computed(
        self, tmp_path: Path, folder: Path, weight: Tensor, name: str, factorized: list[Tensor]
    ) -> None:
        FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder)).get(name, weight)
        assert len(factorized) == 1

    def test_file_in_place_of_the_folder_and_16_bits(self, tmp_path: Path, folder: Path, weight: Tensor) -> None:
        file = tmp_path / "factors.safetensors"
        save_file({key: t.bfloat16() for key, t in load_file(folder / "model.safetensors").items()}, file)
        published = load_upstream_factors(file)
        assert sorted(published) == ["model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate_proj"]
        found = FactorStore(tmp_path / "cache", 8, 0, published).get(self.LAYER, weight)
        assert found.a.dtype == torch.float32
        assert_close_rms(product(found), weight, torch.bfloat16)

    def test_most_specific_name_wins(self, tmp_path: Path, weight: Tensor) -> None:
        short, long = (LowRankFactors(torch.full((24, 8), x), torch.ones(8, 40)) for x in (1.0, 2.0))
        published = {"mlp.gate_proj": short, self.LAYER: long}
        assert identical(FactorStore(tmp_path, 8, 0, published).get(self.LAYER, weight), long)

    def test_nothing_is_transposed_in_silence(self, tmp_path: Path, folder: Path, weight: Tensor) -> None:
        store = FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder))
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.w1 has shape \(24, 8\).*\(40, 8\)"):
            store.get(self.LAYER, weight.mT)
        with pytest.raises(ValueError, match=r"gate_proj\.w2 has shape \(8, 40\).*\(8, 41\)"):
            store.get(self.LAYER, torch.zeros(41, 24))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "no predictor factors"),
            ({"up.w1": torch.ones(4, 2)}, r"up\.w1 is there, up\.w2 is missing"),
            ({"up.w2": torch.ones(2, 4)}, r"up\.w1 is missing"),
            ({"up.w1": torch.ones(4, 2), "up.w2": torch.ones(4, 2)}, r"up\.w1 and up\.w2.*\(4, 2\)"),
            ({"up.w1": torch.ones(4), "up.w2": torch.ones(2, 4)}, r"up\.w1"),
            ({"up.w1": torch.full((4, 2), torch.nan), "up.w2": torch.ones(2, 4)}, r"up\.w1 holds NaN"),
            ({"model.up_proj.weight": torch.ones(4, 4)}, r"model\.up_proj\.weight"),
            ({"w1": torch.ones(4, 2), "w2": torch.ones(2, 4)}, "w1"),
        ],
    )
    def test_other_files(self, tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_upstream_factors(tmp_path)

    def test_absent_and_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot read"):
            load_upstream_factors(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="damaged"):
            load_upstream_factors(tmp_path)
