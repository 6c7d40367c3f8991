"""A bank from the first adapter to a composed one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from banks import Made, write_base
from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.bank.distances import DISTANCES
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.weighting import WEIGHTINGS
from tolerances import assert_close_rms

NEAR_A1 = [[3, 3, 3, 4]]


def products(folder: Path) -> dict[str, Tensor]:
    adapter = open_adapter(folder)
    return {name: layer.scale * (b @ a) for name, layer in adapter.layers.items() for a, b in [adapter.factors(name)]}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_listed(filled: AdapterBank) -> None:
    record = filled.list()[3]
    assert (record.name, record.rank, record.layers, record.tokens) == ("a3", 2, 2, 5)
    assert record.provenance == "seed 3" and record.header == filled.header and record.header.base_name == "base"
    assert filled.check() == ()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_near_data_weigh_most(filled: AdapterBank, distance: str, weighting: str) -> None:
    near = filled.neighbours(NEAR_A1, distance=distance, weighting=weighting)
    assert min(near.distances, key=lambda name: near.distances[name]) == "a1"
    assert sum(near.weights.values()) == pytest.approx(1)
    if weighting != "mlp":  # adapters with nothing in common teach the network to trust no distance
        fixed = filled.neighbours(NEAR_A1, distance=distance, weighting=weighting, temperature=0.05)
        assert max(fixed.weights, key=lambda name: fixed.weights[name]) == "a1"


def test_the_composed_adapter_is_the_weighted_sum(filled: AdapterBank, tmp_path: Path) -> None:
    found = filled.compose(NEAR_A1, tmp_path / "out", rank=10, temperature=1.0, progress=False)
    assert found.exact and found.error < 1e-3 and found.temperature == 1.0
    sources = {record.name: products(filled.folder / "adapters" / record.folder) for record in filled.list()}
    for name, product in products(tmp_path / "out").items():
        expected = sum(weight * sources[each][name].double() for each, weight in found.weights.items())
        assert_close_rms(product, torch.as_tensor(expected), torch.float32)
    told = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert told["weights"] == found.weights and told["error"] == found.error


def test_a_bank_of_one_gives_it_back(bank: AdapterBank, base: Path, made: Made, tmp_path: Path) -> None:
    source = made(rank=3)
    bank.add("only", source, [[1, 2]], base=base)
    found = bank.compose([[5]], tmp_path / "out", progress=False)
    assert found.rank == 3 and found.weights == {"only": 1.0}
    for name, product in products(tmp_path / "out").items():
        assert_close_rms(product, products(source)[name])


def test_some_may_be_left_out(filled: AdapterBank) -> None:
    near = filled.neighbours(NEAR_A1, without=["a1", "a0"])
    assert set(near.weights) == {"a2", "a3", "a4"}
    with pytest.raises(BankError, match="no adapter 'b'; it has a0, a1"):
        filled.neighbours(NEAR_A1, without=["b"])
    with pytest.raises(BankError, match="no adapter to compose of"):
        filled.neighbours(NEAR_A1, without=[f"a{i}" for i in range(5)])


def test_weights_may_be_given(filled: AdapterBank, tmp_path: Path) -> None:
    filled.combine({"a0": 0.25, "a4": -1.0, "a2": 0.0}, tmp_path / "out", rank=4, progress=False)
    first, last = (products(filled.folder / "adapters" / filled.list()[i].folder) for i in (0, 4))
    for name, product in products(tmp_path / "out").items():
        assert_close_rms(product, 0.25 * first[name] - last[name], torch.float32)
    with pytest.raises(BankError, match="no adapter 'b'"):
        filled.combine({"b": 1.0}, tmp_path / "other", progress=False)


def test_an_adapter_of_another_base_is_refused(bank: AdapterBank, made: Made, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", 1)
    before = everything(bank.folder)
    with pytest.raises(BankError, match=r"other \(\w{8}\) is not the bank's, base \(\w{8}\); .*bank of that base"):
        bank.add("a", made(), [[1]], base=other)
    assert everything(bank.folder) == before


def test_an_adapter_that_does_not_fit_its_base_is_refused(bank: AdapterBank, base: Path, made: Made) -> None:
    with pytest.raises(BankError, match=r"up_proj is \(12, 9\), in the base \(12, 8\)"):
        bank.add("a", made(layers={"model.layers.0.mlp.up_proj": (12, 9)}), [[1]], base=base)


def test_what_cannot_be_added_changes_nothing(filled: AdapterBank, base: Path, made: Made) -> None:
    before = everything(filled.folder)
    nan = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.full((2, 8), float("nan"))}
    for name, adapter, data, message in (
        ("a1", made(), [[1]], "has an adapter 'a1'; remove it first"),
        ("../a", made(), [[1]], "no name for an adapter"),
        ("b", made(use_dora=True), [[1]], "DoRA"),
        ("b", made(), [[99]], "vocabulary of 20"),
        ("b", made(tensors=nan), [[1]], "NaN"),
    ):
        with pytest.raises(BankError, match=message):
            filled.add(name, adapter, data, base=base)
    assert everything(filled.folder) == before


def test_a_removed_adapter_is_gone_with_its_files(filled: AdapterBank) -> None:
    filled.remove("a2")
    assert [record.name for record in filled.list()] == ["a0", "a1", "a3", "a4"]
    assert not list((filled.folder / "adapters").glob("*a2*")) and filled.check() == ()
    with pytest.raises(BankError, match="no adapter 'a2'"):
        filled.remove("a2")


def test_the_bank_has_copies_of_its_own(bank: AdapterBank, base: Path, made: Made) -> None:
    source = made()
    bank.add("a", source, [[1]], base=base)
    (source / "adapter_model.safetensors").write_bytes(b"")
    assert bank.check() == ()


def test_a_file_that_was_cut_is_named(filled: AdapterBank, tmp_path: Path) -> None:
    folder = filled.folder / "adapters" / filled.list()[0].folder
    weights, data = folder / "adapter_model.safetensors", folder / "data.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(BankError, match=r"adapter_model\.safetensors has \d+ bytes, not \d+; remove the adapter 'a0'"):
        filled.compose(NEAR_A1, tmp_path / "out", progress=False)
    weights.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(BankError, match=r"data\.safetensors is damaged .*remove the adapter 'a0'"):
        filled.neighbours(NEAR_A1)
    data.unlink()
    with pytest.raises(BankError, match=r"data\.safetensors is damaged"):
        filled.neighbours(NEAR_A1)
    assert not (tmp_path / "out").exists()


def test_places_where_no_bank_can_be(bank: AdapterBank, base: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"no bank at .*; AdapterBank\.create makes one"):
        AdapterBank(tmp_path / "nowhere")
    with pytest.raises(BankError, match="is not empty"):
        AdapterBank.create(bank.folder, base)
    assert bank.list() == ()


def test_a_lock_that_is_held_is_an_error_in_the_end(
    bank: AdapterBank, base: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr("sparse_compile.bank.adapter_bank.PATIENCE_S", 0.1)
    with FileLock(bank.folder / ".lock"), pytest.raises(BankError, match="end the other process"):
        bank.add("a", made(), [[1]], base=base)
    bank.add("a", made(), [[1]], base=base)
