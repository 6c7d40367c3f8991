"""The composed folder: one adapter for PEFT, of adapters of any rank and any layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from banks import LAYERS, Made
from models import tiny_llama
from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.compose import compose_adapter
from sparse_compile.bank.errors import BankError
from tolerances import assert_close_rms

UP, DOWN = LAYERS


def test_ranks_and_scales_are_mixed(made: Made, tmp_path: Path) -> None:
    adapters = {str(rank): open_adapter(made(rank=rank, seed=rank, lora_alpha=3)) for rank in (1, 4, 2)}
    found = compose_adapter(adapters, {"1": 0.2, "4": 0.5, "2": 0.3}, tmp_path / "out", rank=7, progress=False)
    composed = open_adapter(found.folder)
    assert found.rank == 7 and found.error < 1e-3
    for name, layer in composed.layers.items():
        a, b = composed.factors(name)
        parts = {key: adapters[key].factors(name) for key in adapters}
        expected = sum(w * 3 / int(key) * parts[key][1] @ parts[key][0] for key, w in found.weights.items())
        assert_close_rms(layer.scale * (b @ a), torch.as_tensor(expected))
        # The scale is that of the adapter with the largest weight.
        assert layer.scale == pytest.approx(3 / 4)


def test_the_error_of_a_lower_rank_is_what_is_lost(made: Made, tmp_path: Path) -> None:
    adapters = {str(seed): open_adapter(made(rank=3, seed=seed)) for seed in range(3)}
    weights = dict.fromkeys(adapters, 1 / 3)
    whole, low = (compose_adapter(adapters, weights, tmp_path / str(r), r, progress=False) for r in (9, 2))

    def products(folder: Path) -> torch.Tensor:
        opened = open_adapter(folder)
        pairs = ((layer.scale, *opened.factors(name)) for name, layer in opened.layers.items())
        return torch.cat([(scale * b @ a).flatten() for scale, a, b in pairs])

    exact = products(whole.folder)
    assert low.error == pytest.approx(float((products(low.folder) - exact).norm() / exact.norm()), rel=1e-3)
    assert 0.1 < low.error < 1


def test_a_layer_of_some_adapters_alone(made: Made, tmp_path: Path) -> None:
    """PEFT gets the smaller rank of that layer by a pattern."""
    both, one = open_adapter(made(rank=4)), open_adapter(made(rank=1, seed=5, layers={UP: LAYERS[UP], "other": (6, 6)}))
    found = compose_adapter({"both": both, "one": one}, {"both": 0.5, "one": 0.5}, tmp_path / "out", progress=False)
    composed = open_adapter(found.folder)
    assert {name: layer.rank for name, layer in composed.layers.items()} == {UP: 4, DOWN: 4, "other": 1}
    assert {layer.scale for layer in composed.layers.values()} == {2.0}
    a, b = composed.factors("other")
    a_1, b_1 = one.factors("other")
    assert_close_rms(2 * (b @ a), 0.5 * 2 * (b_1 @ a_1), torch.float32)


def test_peft_computes_the_sum(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for seed, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "v_proj"])):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2 + seed, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_llama(layers=2), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / str(seed))
    adapters = {str(seed): open_adapter(tmp_path / str(seed)) for seed in range(2)}
    found = compose_adapter(adapters, {"0": 0.7, "1": 0.3}, tmp_path / "out", rank=5, progress=False)
    plain = tiny_llama(layers=2).eval()
    ids = torch.randint(97, (2, 9))
    for name, weight in plain.named_parameters():
        path = name.removesuffix(".weight")
        for key, share in found.weights.items():
            if path in adapters[key].layers:
                a, b = adapters[key].factors(path)
                weight.data += share * adapters[key].layers[path].scale * (b @ a)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(layers=2), found.folder).eval()
    with torch.no_grad():
        assert_close_rms(loaded(ids).logits, plain(ids).logits)


def test_what_does_not_fit_together_is_refused(made: Made, tmp_path: Path) -> None:
    one, other = open_adapter(made()), open_adapter(made(layers={UP: (12, 9)}))
    turned = open_adapter(made(fan_in_fan_out=True))
    out = tmp_path / "out"
    for second, weights, message in (
        (other, (0.5, 0.5), r"up_proj is \(12, 8\) in a and \(12, 9\) in b"),
        (turned, (0.5, 0.5), "fan_in_fan_out"),
        (one, (0.0, 0.0), "not all zero"),
        (one, (0.5, float("nan")), "finite"),
    ):
        with pytest.raises(BankError, match=message):
            compose_adapter({"a": one, "b": second}, dict(zip("ab", weights, strict=True)), out, progress=False)
    with pytest.raises(BankError, match="rank=0"):
        compose_adapter({"a": one}, {"a": 1.0}, out, 0, progress=False)
    out.mkdir()
    with pytest.raises(BankError, match="is there already"):
        compose_adapter({"a": one}, {"a": 1.0}, out, progress=False)


def test_a_write_that_fails_leaves_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_compile.bank.compose.save_file", full)
    with pytest.raises(OSError, match="No space"):
        compose_adapter({"a": open_adapter(made())}, {"a": 1.0}, tmp_path / "new" / "out", progress=False)
    assert list((tmp_path / "new").iterdir()) == []
