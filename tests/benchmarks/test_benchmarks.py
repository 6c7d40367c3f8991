"""The benchmark's arithmetic, its FLOPs against PyTorch's own counter, and one run of the program. No times."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sparse_compile
from programs import imported
from sparse_compile.cli.paired import ArmTimes

pytest.importorskip("peft")
pytest.importorskip("transformers")

MODULES = ("workloads", "measure", "rows", "figures", "plot", "cpu", "scale")
TINY = {"layers": 4, "hidden": 64, "ffn": 256, "heads": 4, "kv_heads": 2, "vocab": 97, "length": 16, "output": 4}


@pytest.fixture(scope="module")
def benchmarks(repo_root: Path) -> Iterator[dict[str, ModuleType]]:
    """Import the benchmark's modules as its programs do: from their own folder."""
    with imported(repo_root / "benchmarks", MODULES) as found:
        yield found


@pytest.fixture
def measure(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["measure"]


@pytest.fixture
def tiny(benchmarks: dict[str, ModuleType]) -> Any:
    return dataclasses.replace(benchmarks["workloads"].WORKLOADS["math10k-mini"], rank=4, **TINY)


# --- Turns ------------------------------------------------------------------------------------------------------------


def test_eager_arms_are_known_by_their_names(
    measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_compile.cli.paired.load_compiler", lambda: None)
    steps: dict[str, Callable[[], float]] = {name: lambda: 1.0 for name in ("eager", "dora/eager", "liger")}
    assert measure.interleaved(steps, tmp_path, rounds=1, warm_up=0).keys() == steps.keys()
    with pytest.raises(RuntimeError, match="o2 compiled nothing"):
        measure.interleaved({"o2": lambda: 1.0}, tmp_path, rounds=1, warm_up=0)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_flops_agree_with_torchs_counter(
    benchmarks: dict[str, ModuleType], measure: ModuleType, tiny: Any, dtype: str
) -> None:
    workload = dataclasses.replace(tiny, dtype=dtype)
    counted = measure.counted_flops(workload)
    flops = measure.rewritten_flops(benchmarks["workloads"].base_model(workload), workload, "none")
    # Eager attention does two products forward and four backward over all scores. Fused causal attention does half of
    # the scores, and one product more backward, which computes the scores again.
    assert flops.before == counted.linear + counted.attention * 7 / 12
    assert (flops.after, flops.limit, flops.weights_limit) == (flops.before, 1.0, 1.0)


@pytest.mark.slow
def test_flops_of_a_sparse_step(benchmarks: dict[str, ModuleType], measure: ModuleType, tiny: Any) -> None:
    base = benchmarks["workloads"].base_model(tiny)
    flops = measure.rewritten_flops(base, tiny, "o2:")
    # Of four blocks, the two in the middle have a sparse feed-forward part; attention this narrow does not pay.
    assert (flops.sites, flops.sparse_sites) == (8, 2)
    tokens, hidden, kv = tiny.batch * tiny.length, tiny.hidden, tiny.hidden // 2
    attention, ffn = 2 * hidden * (hidden + kv), 3 * hidden * tiny.ffn
    weights = 4 * (attention + ffn) + hidden * tiny.vocab
    # The first block's query, key and value need no gradient of their input.
    assert flops.weights_before == tokens * (4 * weights - 2 * hidden * (hidden + 2 * kv))
    # 256 - floor(256 * 0.99) = 3 channels are kept; the last prompt token predicts an answer, so it is dense.
    context = tiny.batch * (tiny.length - tiny.output - 1)
    assert flops.weights_before - flops.weights_after == pytest.approx(2 * 4 * ffn * context * (1 - 3 / 256))
    assert 1 < flops.limit < flops.weights_limit
    # The head, the last feed-forward part and the last output projection run for the rows of the loss, both ways.
    exact = measure.rewritten_flops(base, tiny, "exact:select_loss_rows")
    ignored = tiny.batch * (tiny.length - tiny.output)
    assert exact.weights_before - exact.weights_after == pytest.approx(
        4 * ignored * (hidden * tiny.vocab + ffn + hidden * hidden)
    )
    both = measure.rewritten_flops(base, tiny, "o2")
    assert both.weights_after == pytest.approx(flops.weights_after + exact.weights_after - flops.weights_before)


def test_arms_are_presets_with_passes(measure: ModuleType) -> None:
    assert measure.options_of("o2") == {"preset": "o2", "disable": [], "start_step": 0, "kernels": "measured"}
    assert "select_loss_rows" in measure.options_of("o2:")["disable"]
    assert measure.options_of("dense/o2")["start_step"] > 10**6
    assert "select_loss_rows" not in measure.options_of("exact:select_loss_rows")["disable"]
    measure.check_arm("dora/eager")
    for unknown in ("o3", "exact:find_ffn", "eager:"):
        with pytest.raises(ValueError, match=f"no arm {unknown!r}"):
            measure.options_of(unknown)


# --- Workloads and the program ----------------------------------------------------------------------------------------


def test_arms_share_frozen_weights_only(benchmarks: dict[str, ModuleType], tiny: Any) -> None:
    workloads = benchmarks["workloads"]
    base = workloads.base_model(tiny)
    first, second = (workloads.adapted_model(base, tiny) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert one.requires_grad == ("lora_" in name)
        assert (one is other) != one.requires_grad
        assert one.equal(other)


def test_labels_lie_at_the_end(benchmarks: dict[str, ModuleType], tiny: Any) -> None:
    batch = benchmarks["workloads"].make_batch(tiny)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [4, 4]
    assert batch["labels"][:, -4:].equal(batch["input_ids"][:, -4:])


def test_label_names_what_is_not_the_workloads_own(benchmarks: dict[str, ModuleType]) -> None:
    csr = benchmarks["workloads"].WORKLOADS["csr-mini"]
    assert csr.label == "csr-mini"
    assert dataclasses.replace(csr, layers=2, dtype="bf16").label == "csr-mini layers=2 dtype=bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "math"], "no workload 'math'; there are math10k-mini, csr-mini"),
        (["--arms", "eager,o3"], "no arm 'o3'"),
        (["--layers", "0"], "must be at least 1"),
        (["--hidden", "100"], "must divide hidden"),
        (["--length", "8"], "is larger than length"),
    ],
)
def test_mistakes_are_told_at_once(
    benchmarks: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmarks["cpu"].main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_program_appends_rows(benchmarks: dict[str, ModuleType], repo_root: Path, tmp_path: Path) -> None:
    sizes = [text for name, size in TINY.items() for text in (f"--{name.replace('_', '-')}", str(size))]
    program = [sys.executable, str(repo_root / "benchmarks" / "cpu.py"), "--arms", "eager", "--steps", "1", *sizes]
    out = tmp_path / "rows" / "cpu.jsonl"
    out.parent.mkdir()
    out.write_text('{"label": "an older row"}\n')
    done = subprocess.run([*program, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "math10k-mini" in done.stdout
    older, row = benchmarks["rows"].read_rows([out])
    assert older == {"label": "an older row"}
    assert list(row) == [field.name for field in dataclasses.fields(benchmarks["rows"].Row)]
    assert (row["arm"], row["rounds"], row["graphs"], row["ratios"]) == ("eager", 1, 0, {})
    assert row["workload"]["layers"] == 4
    assert row["step_seconds"]["median"] > 0 and row["first_loss"] > 0
    assert row["machine"]["cpu"] and row["machine"]["threads"] >= 1 and row["versions"]["torch"]
    assert "--arms eager" in row["command"]


def test_checkpointing_is_said_in_the_label_and_leaves_no_hook(benchmarks: dict[str, ModuleType], tiny: Any) -> None:
    workloads = benchmarks["workloads"]
    checkpointed = dataclasses.replace(tiny, checkpointing=True)
    assert checkpointed.label == f"{tiny.label} checkpointing=True"
    base = workloads.base_model(tiny)
    for workload in (tiny, checkpointed):
        model = workloads.adapted_model(base, workload)
        layers = [module for module in model.modules() if "gradient_checkpointing" in vars(module)]
        assert any(layer.gradient_checkpointing for layer in layers) == workload.checkpointing
        assert not any(module._forward_hooks for module in model.modules())


def test_bytes_of_a_step_are_those_alive_at_once(measure: ModuleType) -> None:
    kept = []

    def step() -> float:
        for _ in range(3):
            torch.zeros(1000, dtype=torch.float64).sum()
        kept.append(torch.zeros(500, dtype=torch.float64))
        return 0.0

    assert 8000 <= measure.step_bytes(step) < 8000 + 500
    kept.clear()
    first = torch.zeros(4000, dtype=torch.float64)
    assert 8000 <= measure.step_bytes(lambda: float(torch.zeros(1000, dtype=torch.float64).sum())) < 8000 + 500
    del first


# --- Rows, table and picture ------------------------------------------------------------------------------------------


@pytest.fixture
def row(benchmarks: dict[str, ModuleType], tiny: Any) -> Any:
    measure, cpu = benchmarks["measure"], benchmarks["cpu"]
    times = {
        "inductor": ArmTimes(9.0, (2.0, 2.2, 1.8), 4.5, 1),
        "o2": ArmTimes(12.0, (1.0, 1.1, 0.9), 4.6, 1),
    }
    flops = measure.Flops(before=3e9, after=1.2e9, weights_before=2e9, weights_after=1e9, sites=8, sparse_sites=2)
    alone = measure.Alone(12.0, 4.0, 3 * 2**20, 5 * 2**20, 2**20)
    surroundings = benchmarks["rows"].environment("cpu.py", ["--quick"])
    return cpu._row(tiny, "o2", times, flops, alone, counted={"linear": 1, "attention": 1}, **surroundings)


def test_efficiency_is_the_ratio_to_inductor_over_the_flop_limit(row: Any) -> None:
    assert row.ratios["inductor"].median == pytest.approx(2.0)
    assert row.flops_limit == 2.5
    assert row.flops_limit_weights == 2.0
    assert row.efficiency == pytest.approx(0.8)
    assert list(row.ratios) == ["inductor"]
    assert row.command == "benchmarks/cpu.py --quick"


def test_table(benchmarks: dict[str, ModuleType], row: Any) -> None:
    header, line = benchmarks["rows"].table([row]).splitlines()
    assert len(header) == len(line)
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:2] == ["o2", "1.000 s"]
    assert cells[3:] == ["-", "2.00x", "2.50x", "2.00x", "0.80", "2/8", "12.0 s", "3 MiB", "1 MiB", "12.0/4.0 s"]


def test_plot_draws_the_newest_rows(benchmarks: dict[str, ModuleType], row: Any, tmp_path: Path) -> None:
    plot, rows = benchmarks["plot"], benchmarks["rows"]
    older = dataclasses.replace(row, date="2000-01-01T00:00:00+00:00", efficiency=0.1)
    peer = dataclasses.replace(row, arm="inductor", ratios={}, flops_limit=None)
    rows.append_rows([each.to_dict() for each in (row, older, peer)], tmp_path / "rows.jsonl")
    assert plot.newest_ratios(rows.read_rows([tmp_path / "rows.jsonl"])) == [json.loads(json.dumps(row.to_dict()))]
    assert plot.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "ratios.png")]) == 0
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    read = rows.read_rows([tmp_path / "rows.jsonl"])
    assert plot.newest_ratios(read, labels=[row.label], arms=[row.arm]) == plot.newest_ratios(read)
    assert not plot.newest_ratios(read, labels=["another"]) and not plot.newest_ratios(read, arms=["another"])
    drawn = []
    for name in ("once.svg", "again.svg"):
        assert plot.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / name)]) == 0
        drawn.append((tmp_path / name).read_text(encoding="utf-8"))
    assert "2.50x" in drawn[0] or "2.00x" in drawn[0]
    assert drawn[0] == drawn[1], "equal rows give equal files"
    rows.append_rows([peer.to_dict()], tmp_path / "peers.jsonl")
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(tmp_path / "peers.jsonl"), "--out", str(tmp_path / "nothing.png")])


# --- Curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_point_of_a_curve_names_the_middle_blocks(benchmarks: dict[str, ModuleType], tiny: Any) -> None:
    scale, workloads = benchmarks["scale"], benchmarks["workloads"]
    points = [point for curve in scale.CURVES.values() for point in curve()]
    assert len({(point.curve, point.x) for point in points}) == len(points)
    assert all(point.workload.layers == scale.LAYERS for point in points)
    small = dataclasses.replace(points[0], workload=tiny)
    model = workloads.adapted_model(workloads.base_model(tiny), tiny)
    report = sparse_compile.explain(model, config=small.options, **workloads.make_batch(tiny))
    names = {site.name.split(".", 3)[-1] for site in report.sites if site.sparsity}
    assert names == {f"layers.{layer}.{kind}" for layer in (1, 2) for kind in scale.SPARSITY}
    # Named sites are sparse whether it pays or not, and so small a model it does not pay for.
    assert all(site.reason.startswith("saves ") for site in report.sites if site.sparsity)


def test_curves_are_drawn(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    figures = [{"median": value, "p20": value, "p80": value} for value in (1.2, 1.5)]
    rows = [
        {"curve": "length", "x": x, "date": "2026", "exact": figures[0], "sparse": figures[1], "notes": notes}
        for x, notes in ((128, {"mlp": "saves little"}), (256, {}))
    ]
    benchmarks["scale"].draw(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
