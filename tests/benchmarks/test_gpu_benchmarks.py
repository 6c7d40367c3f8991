"""The benchmarks that are for a GPU, as far as one can be done without: their cases, arithmetic and sizes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from programs import imported
from sparse_compile.cli.paired import training_step

pytest.importorskip("peft")
pytest.importorskip("transformers")

MODULES = (
    "workloads", "liger", "measure", "rows", "roofline", "kernels_report", "gpu_kernels", "figures", "gpu_plot", "gpu",
    "compile_time",
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmarks(repo_root: Path) -> Iterator[dict[str, ModuleType]]:
    with imported(repo_root / "benchmarks", MODULES) as found:
        yield found


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


@pytest.fixture(scope="module")
def tiny(benchmarks: dict[str, ModuleType]) -> Any:
    return dataclasses.replace(
        benchmarks["workloads"].WORKLOADS["math10k-mini"],
        layers=1, hidden=32, ffn=64, heads=2, kv_heads=1, vocab=53, length=12, output=4, rank=2,
    )  # fmt: skip


def test_steps(benchmarks: dict[str, ModuleType], tiny: Any) -> None:
    missing, row = benchmarks["gpu"].measure_steps(tiny, ["liger", "eager"], "cpu", rounds=2)
    assert (missing["arm"], missing["error"]) == ("liger", "not installed")
    assert row["arm"] == "eager" and row["step_seconds"]["median"] > 0 and row["ratios"] == {}
    assert row["predictor_share"] == 0


def test_an_arm_that_fails_does_not_stop_the_others(
    benchmarks: dict[str, ModuleType], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = benchmarks["gpu"]
    build, calls = gpu.training_step, iter(range(2))

    def training_step(model: Any, batch: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError("no room for it")
        return build(model, batch)

    monkeypatch.setattr("sparse_compile.cli.paired.load_compiler", lambda: None)
    monkeypatch.setattr(gpu, "training_step", training_step)
    monkeypatch.setattr(
        gpu, "arm_model", lambda base, workload, arm: benchmarks["measure"].arm_model(base, workload, "eager")
    )
    measured = gpu._measured
    monkeypatch.setattr(
        gpu, "_measured", lambda of, arms, *rest: measured(of, arms, *rest) if len(arms) > 1 else [{"arm": arms[0]}]
    )
    failed, other = gpu.measure_steps(tiny, ["eager", "o2"], "cpu", rounds=1)
    assert (failed["arm"], failed["error"]) == ("o2", "MemoryError: no room for it")
    assert other["arm"] == "eager" and other["label"] == failed["label"] == tiny.label


def test_the_share_of_the_predictor(benchmarks: dict[str, ModuleType]) -> None:
    x, a, b = torch.randn(64, 32), torch.randn(32, 4), torch.randn(4, 48)
    valid = torch.ones(64, dtype=torch.bool)

    def step() -> float:
        torch.ops.sparselora.top_channels(torch.ops.sparselora.predicted_norms(x, valid, a, b), 5, "site")
        return float((x @ x.T).exp().sum())

    assert 0 < benchmarks["gpu"].predictor_share(step) < 1
    assert benchmarks["gpu"].predictor_share(lambda: float(x.sum())) == 0


def test_liger_computes_its_own_arm_alone(
    benchmarks: dict[str, ModuleType], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in replaces a function of transformers' module, for all models, as Liger does."""
    from transformers.models.llama import modeling_llama

    original, rotated, given = modeling_llama.apply_rotary_pos_emb, [], []

    def apply_liger_kernel_to_llama(model: Any) -> None:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            rotated.append(1)
            return original(*args, **kwargs)

        given.append(model)
        modeling_llama.apply_rotary_pos_emb = rotate

    stand_in = ModuleType("liger_kernel.transformers")
    stand_in.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    measure, workloads = benchmarks["measure"], benchmarks["workloads"]
    measure.check_arm("liger")
    base, batch = workloads.base_model(tiny), workloads.make_batch(tiny)
    losses = {}
    for arm in ("liger", "eager"):
        losses[arm] = training_step(measure.arm_model(base, tiny, arm), batch)()
        assert len(rotated) == 1 and modeling_llama.apply_rotary_pos_emb is original
    assert type(given[0]).__name__ == "LlamaForCausalLM" and losses["liger"] == losses["eager"]


def test_what_fails_is_named_and_the_rest_is_measured(
    benchmarks: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The whole program but for what needs a GPU: its kernels, its steps and its name."""
    gpu, gpu_kernels = benchmarks["gpu"], benchmarks["gpu_kernels"]
    ones = torch.ones(3)
    right = gpu_kernels.KernelCase("right", lambda provider: [ones], lambda: [ones.double()], 0.0, 1.0)
    wrong = dataclasses.replace(right, name="wrong", run=lambda provider: [2 * ones])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "kernel_cases", lambda case, device: iter([wrong, right]))
    monkeypatch.setattr(gpu, "launch_seconds", lambda run: [1e-4])
    third = {"median": 0.5, "p20": 0.5, "p80": 0.5}
    good = {
        "workload": {"name": "math10k-8b"},
        "label": "math10k-8b layers=2",
        "arm": "o2",
        "step_seconds": third,
        "ratios": {"eager": third},
    }
    good |= {"first_call_seconds": 60.0, "peak_bytes": 2**34, "predictor_share": 0.011}

    def measure_steps(workload: Any, arms: list[str], device: str, rounds: int) -> list[dict[str, Any]]:
        if workload.name == "csr-8b":
            raise RuntimeError("compiled again")
        assert workload.layers == 2 and arms == ["eager", "inductor", "liger", "exact", "o2", "triton/o2"]
        return [{"label": good["label"], "arm": "liger", "error": "not installed"}, good]

    monkeypatch.setattr(gpu, "measure_steps", measure_steps)
    out = tmp_path / "rows.jsonl"
    assert gpu.main(["--layers", "2", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "FAILED math10k-8b, wrong: AssertionError" in printed.err
    assert "FAILED csr-8b, steps: RuntimeError: compiled again" in printed.err
    assert "liger: not installed" in printed.out
    assert "o2: 500.0 ms; 0.50x eager; first call 60 s, peak 16.0 GiB; predictor 1.1%" in printed.out
    rows = benchmarks["rows"].read_rows([out])
    assert [row.get("kernel", row.get("arm")) for row in rows] == ["right", "liger", "o2", "right"]
    assert gpu.main(["--parts", "steps", "--workload", "math10k-8b", "--layers", "2", "--out", str(out)]) == 0
    drawn = out.with_suffix(".svg").read_text(encoding="utf-8")
    assert all(text in drawn for text in ("NVIDIA H200", "math10k-8b", "csr-8b", "right", "o2", "0.50x"))
    assert gpu.main(["--parts", "steps", "--workload", "csr-8b", "--layers", "2", "--out", str(tmp_path / "none")]) == 1
    assert "nothing is drawn" in capsys.readouterr().err


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


def test_compile_time_has_the_sites_of_a_preset(benchmarks: dict[str, ModuleType]) -> None:
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
