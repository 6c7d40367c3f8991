"""`sparselora doctor`: what is well, what is not, and a model that is trained to see."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_compile.cli import machine, self_test
from sparse_compile.cli.self_test import Trial

CPU = torch.device("cpu")
GOOD = Trial("exact", "reference", 1.0, 1e-7, "")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Stand in for the self-test: what it finds."""
    found = [GOOD]
    monkeypatch.setattr("sparse_compile.cli.doctor.self_test", lambda device: found)
    return found


def fault_of(name: str) -> str:
    (check,) = [check for check in machine.checks(CPU) if check.name == name]
    return check.fault


def test_a_healthy_machine(run: Callable[..., Any], trials: list[Trial]) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "all is well"
    assert f"torch               {torch.__version__}" in result.stdout


def test_a_fault_is_the_exit_status(run: Callable[..., Any], trials: list[Trial]) -> None:
    trials.append(dataclasses.replace(GOOD, name="sparse", fault="the loss is off\nby 1"))
    result = run("doctor", "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["healthy"], data["faults"]) == (1, False, ["sparse: the loss is off; by 1"])
    assert run("doctor").stdout.splitlines()[-2:] == ["FAULT sparse: the loss is off; by 1", "1 faults"]


def test_versions_are_compared_with_what_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "2.10.0" if name == "torch" else installed(name))
    assert fault_of("torch") == "torch<2.14,>=2.11 is admitted: pip install 'torch<2.14,>=2.11'"
    assert fault_of("transformers") == ""


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpp_compiler", lambda: None)
    assert "install g++ or clang" in fault_of("C++ compiler")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSELORA_CACHE_DIR", str(tmp_path / "new" / "folder"))
    assert fault_of("cache of predictor") == "" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELORA_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert "SPARSELORA_CACHE_DIR" in fault_of("cache of predictor")


def test_a_backend_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of("backend") == ""
    monkeypatch.setattr(machine, "registered_backend", lambda name: None)
    assert "install the package again" in fault_of("backend")


# --- The self-test ----------------------------------------------------------------------------------------------------


def test_every_way_trains_as_eager_does(eager_inductor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = self_test.self_test(CPU)
    assert [(each.name, each.providers) for each in found] == [
        ("exact", ""),
        ("sparse, by the reference", "reference"),
        ("sparse, as measured", "cpu_index+cpu_gemm"),
    ]
    assert [each.fault for each in found] == [""] * 3
    assert all(each.error is not None and each.error < 1e-5 for each in found)


def test_the_self_test_can_fail(eager_inductor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compile.kernels.gathered_linear.op import GATHERED_LINEAR

    right = GATHERED_LINEAR["cpu_gemm"]
    monkeypatch.setitem(GATHERED_LINEAR._run, "cpu_gemm", lambda *given: 1.1 * right(*given))  # type: ignore[operator]
    _, reference, measured = self_test.self_test(CPU)
    assert reference.fault == "" and " is off by " in measured.fault


def test_a_backend_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("sparse_compile.compiler.backend.capture_context", broken)
    assert all("no compiler" in each.fault and each.error is None for each in self_test.self_test(CPU))


@pytest.mark.slow
def test_the_doctor_of_this_machine(run: Callable[..., Any]) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stdout + result.stderr
