"""The benchmark of pruned models: its prunings, its rival, its counts, and one run of each part. No times."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models import batch, tiny_llama, with_lora
from programs import imported
from sparse_compile.compiler.peft_support import lora_layers

pytest.importorskip("peft")
pytest.importorskip("transformers")

MODULES = (
    "workloads",
    "measure",
    "rows",
    "markdown",
    "predictor_text",
    "lors_models",
    "lors_speed",
    "lors_quality",
    "lors",
)


@pytest.fixture(scope="module")
def benchmarks(repo_root: Path) -> Iterator[dict[str, ModuleType]]:
    """Import the benchmark's modules as its program does: from their own folder."""
    with imported(repo_root / "benchmarks", MODULES) as found:
        yield found


@pytest.fixture
def models(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["lors_models"]


def dropped(score: Tensor, size: int) -> Tensor:
    """Return true where an entry is among the smaller half of its `size` neighbours."""
    groups = score.reshape(-1, size)
    return (groups <= groups.median(1, keepdim=True).values).reshape(score.shape)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_magnitude(models: ModuleType, pattern: str) -> None:
    model = tiny_llama(layers=1)
    before = model.model.layers[0].mlp.up_proj.weight.detach().abs().clone()
    head = model.lm_head.weight.detach().clone()
    models.prune(model, "magnitude", pattern)
    expected = dropped(before, 4 if pattern == "2:4" else before.numel())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight == 0, expected)
    assert torch.equal(model.lm_head.weight, head)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_wanda(models: ModuleType, pattern: str) -> None:
    """A row's entries by |W| times the norm of their input; padding has no part in it."""
    model = tiny_llama(layers=1)
    inputs = batch(97, padding="right")
    layer = model.model.layers[0].self_attn.q_proj
    before, seen = layer.weight.detach().abs().clone(), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**inputs)
    handle.remove()
    models.prune(model, "wanda", pattern, [inputs])
    score = before * seen[0][inputs["attention_mask"].bool()].norm(dim=0)
    assert torch.equal(layer.weight == 0, dropped(score, 4 if pattern == "2:4" else 64))
    assert not model.model.layers[0].self_attn.q_proj._forward_pre_hooks


def test_the_rival_is_the_masked_function_and_what_it_saves_is_counted(models: ModuleType) -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    base[0].weight.data[:, ::2] = 0
    model = with_lora(base, ("0",))
    ((_, layer),) = lora_layers(model).items()
    rival = models.masked_by_autograd(model)
    assert {id(p) for p in rival.parameters()} == {id(p) for p in model.parameters()}
    x = torch.randn(5, 8, requires_grad=True)
    merged = layer.get_base_layer().weight + layer.scaling["default"] * (
        layer.lora_B.default.weight @ layer.lora_A.default.weight
    )
    merged = merged * (layer.get_base_layer().weight != 0)
    torch.testing.assert_close(rival(x), F.linear(x, merged, layer.get_base_layer().bias).tanh())
    with models.saved_tensors(rival) as saved:
        y = rival(x)
    # Input, masked weight and output of tanh in fp32, the mask; A and B. A number may be saved as a tensor of its own.
    assert 0 <= saved.others - (4 * (5 * 8 + 6 * 8 + 5 * 6) + 6 * 8) <= 8
    assert saved.parameters == 4 * (4 * 8 + 6 * 4)
    y.sum().backward()


@pytest.mark.slow
def test_one_run_of_the_step(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, aot_eager_inductor: Any
) -> None:
    """Masks by autograd save a weight and a mask for each layer; the masked op saves its input and no more."""
    monkeypatch.setattr("sparse_compile.cli.paired.load_compiler", lambda: None)
    sizes = {"layers": 1, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 97, "length": 16, "output": 4}
    workload = dataclasses.replace(benchmarks["lors"].STEP, rank=4, **sizes)
    rows = benchmarks["lors_speed"].measure(
        workload, "2:4", ("eager", "lors", "lors-exact"), 1, 0, time.process_time, ["--speed"]
    )
    by_arm = {row.arm: row for row in rows}
    # q, o: 64 x 64; k, v: 64 x 32; gate, up, down: 64 x 96, on three inputs of 64 and one of 96 numbers a token.
    weights, inputs = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96, 32 * (3 * 64 + 96)
    assert by_arm["lors"].linear_saved.others == by_arm["lors-exact"].linear_saved.others == 4 * inputs
    assert by_arm["eager"].linear_saved.others == pytest.approx(4 * inputs + 5 * weights, rel=0.01)
    assert by_arm["lors"].linear_saved.parameters > 4 * weights > by_arm["eager"].linear_saved.parameters
    assert by_arm["lors"].ratios.keys() == {"eager"} and by_arm["eager"].ratios == {}
    table = benchmarks["lors_speed"].table(benchmarks["lors_speed"].plain(rows))
    assert [len(line) for line in table] == [len(benchmarks["lors_speed"].HEAD)] * 3


@pytest.mark.slow
def test_one_run_of_the_quality(
    benchmarks: dict[str, ModuleType], shared_dir: Path, tmp_path: Path, aot_eager_inductor: Any
) -> None:
    """Each run is a row; what is there is not run again; the tables go where they belong."""
    folder = shared_dir / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"stories260K is not in {shared_dir}")
    data, page, results = tmp_path / "data.jsonl", tmp_path / "page.md", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"Who is {i}?", "answer": "Lily."}) + "\n" for i in range(4)))
    page.write_text("before\n<!-- tables of stories260K -->\n<!-- end of tables of stories260K -->\nafter\n")
    given = {"model": folder, "data": data, "eval-data": data, "out": page, "results": results, "rank": 2}
    given |= {"steps": 2, "batch-size": 2, "length": 32, "records": 4, "held-out": 2, "calibration": 2}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    arguments += ["--prunings=wanda 2:4", "--seeds=0"]
    main = benchmarks["lors"].main
    assert main([*arguments, "--arms=lora,lors-start"]) == 0
    assert main([*arguments, "--arms=lora,sqft,lors-start"]) == 0
    rows = {row["arm"]: row for row in benchmarks["rows"].read_rows([results]) if row["criterion"] == "wanda"}
    assert len(results.read_text().splitlines()) == 1 + len(rows) == 5
    assert [rows[arm]["zeros_lost"] for arm in ("frozen", "sqft", "lors-start")] == [0, 0, 0]
    assert rows["lora"]["zeros_lost"] > 0 and rows["lora"]["loss_pruned_again"] != rows["lora"]["loss"]
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n")
    assert "| wanda 2:4 | `lora` |" in written and "| wanda 2:4 | `lors-start` |" in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --speed, or --model, --data and --eval-data"),
        (["--model=m", "--data=d", "--eval-data=e", "--arms=lors,spp"], "no spp; there are lora, sqft"),
        (["--speed", "--rounds=0"], "must be at least 1, got 0"),
    ],
)
def test_bad_arguments(
    benchmarks: dict[str, ModuleType], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmarks["lors"].main(arguments)
    assert message in capsys.readouterr().err
