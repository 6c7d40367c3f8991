"""The benchmarks that are for a GPU, as far as one can be done without: their cases, arithmetic and sizes."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

MODULES = ("workloads", "measure", "rows", "roofline", "kernels_report", "gpu_kernels", "gpu", "compile_time")


@pytest.fixture(scope="module")
def benchmarks(repo_root: Path) -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_every_kernel_of_a_block_agrees_with_fp64(benchmarks: dict[str, ModuleType]) -> None:
    gpu_kernels, roofline = benchmarks["gpu_kernels"], benchmarks["roofline"]
    sizes = {"batch": 1, "length": 40, "labels": 8, "hidden": 64, "ffn": 224, "heads": 4, "kv_heads": 2, "head_dim": 16}
    case = dataclasses.replace(roofline.CASES["math10k-8b"], **sizes)
    names = []
    for each in gpu_kernels.kernel_cases(case, "cpu"):
        names.append(each.name)
        result, expected = each.run("reference")[0], each.expected()[0]
        assert result.dtype == torch.bfloat16 and expected.dtype == torch.float64
        assert each.error("reference") < gpu_kernels.TOLERANCE
        # The result at least is written, and what is multiplied is read.
        assert each.traffic >= 2 * result.numel() and each.floor(roofline.DEVICES[0]) > 0
    assert len(names) == len(set(names)) == 11


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_wrong_kernel_fails_the_run(benchmarks: dict[str, ModuleType], value: float) -> None:
    gpu_kernels, device = benchmarks["gpu_kernels"], benchmarks["roofline"].DEVICES[0]
    ones = torch.ones(3)
    right = gpu_kernels.KernelCase("right", lambda provider: [ones], lambda: [ones.double()], 0.0, 1.0)
    row = gpu_kernels.measure_kernel(right, ("triton",), device, lambda run: [3.0, 1.0, 2.0])
    assert row["triton"] == {"error": 0.0, "seconds": 2.0}
    # The second result is looked at as well.
    wrong = dataclasses.replace(right, run=lambda provider: [ones, ones * value], expected=lambda: [ones, ones])
    with pytest.raises(AssertionError, match="right by triton: error"):
        gpu_kernels.measure_kernel(wrong, ("triton",), device, lambda run: [1.0])


def test_steps(benchmarks: dict[str, ModuleType]) -> None:
    tiny = dataclasses.replace(
        benchmarks["workloads"].WORKLOADS["math10k-mini"],
        layers=1, hidden=32, ffn=64, heads=2, kv_heads=1, vocab=53, length=12, output=4, rank=2,
    )  # fmt: skip
    (row,) = benchmarks["gpu"].measure_steps(tiny, ["eager"], "cpu", rounds=2)
    assert row["arm"] == "eager" and row["step_seconds"]["median"] > 0 and row["ratios"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_nothing_is_measured(
    benchmarks: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmarks["gpu"].main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_the_arm_that_asks_for_generated_kernels(benchmarks: dict[str, ModuleType]) -> None:
    measure = benchmarks["measure"]
    assert measure.options_of("triton/o2") == measure.options_of("o2") | {"kernels": "triton"}
    measure.check_arm("triton/o2:")
    with pytest.raises(ValueError, match="no arm"):
        measure.check_arm("triton/o9")


@pytest.mark.parametrize("name", ["math10k-8b", "csr-8b"])
def test_roofline(benchmarks: dict[str, ModuleType], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    roofline, workload = benchmarks["roofline"], benchmarks["workloads"].WORKLOADS[name]
    case = roofline.CASES[name]
    assert (case.hidden, case.ffn, case.heads, case.kv_heads) == (
        workload.hidden, workload.ffn, workload.heads, workload.kv_heads,
    )  # fmt: skip
    assert (case.tokens, case.labels, case.rank) == (workload.batch * workload.length, workload.output, workload.rank)
    # The dense block: its weights, twice (forward and gradient of the input), two FLOPs each.
    weights = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    products = [each for each in roofline.dense_block(case) if each.name in ("q, k, v", "o", "gate, up", "down")]
    assert sum(each.flops for each in products) == 2 * 2 * case.tokens * weights
    # Output tokens cost in the sparse block what they cost in the dense one.
    output = [each.flops for each in roofline.sparse_block(case) if "of output tokens" in each.name]
    assert sum(output) == 2 * 2 * (case.tokens - case.context) * weights
    assert roofline.main(["--workload", name]) == 0
    assert f"{case.context} of 4096 tokens are context" in capsys.readouterr().out


def test_the_roofline_in_the_documents_is_that_of_the_program(
    benchmarks: dict[str, ModuleType], repo_root: Path
) -> None:
    text = (repo_root / "docs" / "kernels.md").read_text(encoding="utf-8")
    for case in benchmarks["roofline"].CASES.values():
        assert benchmarks["roofline"].table(case) in text


def test_compile_time_counts_both_phases(benchmarks: dict[str, ModuleType]) -> None:
    compile_time = benchmarks["compile_time"]
    # The blocks of preset `o2`: FFN from 9% to 97% of the depth, attention from 43%; the first and last are dense.
    assert compile_time._between(0.09, 0.97, 16) == list(range(2, 15))
    assert compile_time._between(0.43, 0.97, 32) == list(range(14, 31))


def test_factors_are_timed_cold_and_cached(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile_time = benchmarks["compile_time"]
    monkeypatch.setattr(compile_time, "LLAMA_8B_BLOCK", {"q": (32, 48), "gate": (64, 48)})
    assert compile_time.main(["--factors", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = benchmarks["rows"].read_rows([tmp_path / "rows.jsonl"])
    assert set(row["factors"]) == {"q cold", "q cached", "gate cold", "gate cached"}
