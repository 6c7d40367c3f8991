"""A model with PEFT's DoRA layers is one graph, under any backend, and computes what it does eagerly."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from models import ALL_TARGETS, batch, gradients, tiny_llama, with_lora
from oracle import train_step
from sparse_compile import explain
from sparse_compile.compiler import peft_support
from sparse_compile.compiler.peft_support import make_dora_traceable


def dora_llama(dropout: float = 0.0, layers: int = 2) -> nn.Module:
    return with_lora(tiny_llama(layers=layers), ALL_TARGETS, dora=True, dropout=dropout)


class Eager:
    """A backend that runs each graph as it was captured, and counts them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_graph_bit_equal_to_eager(dropout: float) -> None:
    model, inputs, backend = dora_llama(dropout), batch(97), Eager()
    assert make_dora_traceable() and make_dora_traceable()
    expected = train_step(model, model, inputs, seed=0)
    actual = train_step(model, torch.compile(model, backend=backend, fullgraph=True), inputs, seed=0)
    assert len(backend.graphs) == 1
    assert torch.equal(actual.loss, expected.loss)
    assert actual.gradients.keys() == expected.gradients.keys()
    assert any("magnitude" in name for name in expected.gradients)
    for name, gradient in expected.gradients.items():
        assert gradient.any() and torch.equal(actual.gradients[name], gradient), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_weight_stored_transposed_is_one_graph_too(dropout: float) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=2, target_modules=["0"], use_dora=True, fan_in_fan_out=True, lora_dropout=dropout, init_lora_weights=False
    )
    model = get_peft_model(nn.Sequential(Conv1D(6, 4), nn.LayerNorm(6)), config)
    assert make_dora_traceable()
    x = torch.randn(2, 3, 4, requires_grad=True)

    def step(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        x.grad = None
        call(x).pow(3).sum().backward()
        return {**gradients(model), "x": x.grad}  # type: ignore[dict-item]

    expected = step(model)
    actual = step(torch.compile(model, backend=Eager(), fullgraph=True))
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(actual[name], gradient), name


ONE_PROCESS = """
import sys, warnings
sys.path[:0] = [TESTS]
warnings.simplefilter("ignore")
import torch
if BACKEND_FIRST:
    import sparse_compile.compiler.backend
assert ("sparse_compile" in sys.modules, "peft" in sys.modules) == (BACKEND_FIRST, False)

# What Inductor makes of a graph is tested elsewhere: here AOTAutograd has the last word.
import torch._inductor.compile_fx as inductor
from torch._dynamo.backends.debugging import aot_eager
inductor.compile_fx = lambda gm, inputs, **_: aot_eager(gm, inputs)
from models import batch, tiny_llama, with_lora

model, inputs = with_lora(tiny_llama(layers=1), ("q_proj", "down_proj"), dora=True), batch(97)
loss = model(**inputs).loss
loss.backward()
expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
graphs = torch._dynamo.utils.counters["stats"]

for backend in ("sparselora", "aot_eager"):
    torch._dynamo.reset()
    graphs.clear()
    model.zero_grad()
    options = {"preset": "exact"} if backend == "sparselora" else None
    compiled = torch.compile(model, backend=backend, options=options)(**inputs).loss
    compiled.backward()
    assert graphs["unique_graphs"] == 1, (backend, graphs)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend_first", [False, True])
def test_looking_up_the_backend_is_enough_and_serves_other_backends_too(backend_first: bool, repo_root: Path) -> None:
    program = ONE_PROCESS.replace("TESTS", repr(str(repo_root / "tests" / "helpers")))
    program = program.replace("BACKEND_FIRST", repr(backend_first))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_explain_sees_one_graph() -> None:
    report = explain(dora_llama(layers=1), **batch(97))
    assert len(report.graphs) == 1


@pytest.mark.slow
def test_peft_that_is_not_imported_stays_so() -> None:
    program = (
        "import sys; import sparse_compile.compiler.backend\n"
        "from sparse_compile.compiler.peft_support import make_dora_traceable\n"
        "sys.exit(make_dora_traceable() or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def two_arguments(module: nn.Module, device: str) -> Tensor:
    raise NotImplementedError


def no_default_but_another_name(layer: nn.Module) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("helper", [None, two_arguments, no_default_but_another_name, len, torch.compile])
@pytest.mark.parametrize("where", ["integrations.dequantize_module_weight", "other.transpose"])
def test_another_peft_is_left_alone(where: str, helper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    module, name = where.split(".")
    monkeypatch.setitem(sys.modules, f"peft.utils.{module}", SimpleNamespace(**{name: helper} if helper else {}))
    assert not make_dora_traceable()


def test_a_helper_that_someone_else_substituted_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")

    def dequantize_module_weight(module: nn.Module) -> Any:
        return module.weight

    torch.compiler.substitute_in_graph(dequantize_module_weight)(lambda module: module.weight)
    other = SimpleNamespace(dequantize_module_weight=dequantize_module_weight)
    monkeypatch.setitem(sys.modules, "peft.utils.integrations", other)
    assert not make_dora_traceable()


class Quantised(nn.Linear):
    """Keeps something else than its weight, as HQQ's layers do."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.W_q = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q * 7


class Subclass(nn.Parameter):
    """A parameter of a class that the substitute does not know."""


@pytest.mark.parametrize("kind", ["plain", "tensor", "W_q", "another class"])
def test_quantised_weights_are_left_to_peft(kind: str) -> None:
    from peft.utils import integrations

    assert make_dora_traceable()
    layer = Quantised() if kind == "W_q" else nn.Linear(3, 3)
    if kind == "another class":
        layer.weight = Subclass(torch.randn(3, 3))
    elif kind == "tensor":
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight
    asked = []
    substitute = peft_support._dequantisation(lambda module: (asked.append(module), module.weight)[1])
    assert torch.equal(substitute(layer), layer.weight)
    assert bool(asked) == (kind in ("W_q", "another class"))

    backend = Eager()
    x = torch.randn(2, 3)
    function = torch.compile(lambda x: x @ integrations.dequantize_module_weight(layer), backend=backend)
    assert torch.equal(function(x), x @ integrations.dequantize_module_weight(layer))


def test_a_4_bit_dora_model_computes_as_eager() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x).square().mean()

    assert make_dora_traceable()
    base = Model().to("cpu")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    x = torch.randn(4, 64)
    model(x).backward()
    expected = gradients(model)
    backend = Eager()
    torch.compile(model, backend=backend, fullgraph=True)(x).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


# --- PEFT that is imported after the backend --------------------------------------------------------------------------


@pytest.fixture
def later_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in for a PEFT that is installed and not imported yet; return its folder."""
    folder = tmp_path / "peft"
    (folder / "utils").mkdir(parents=True)
    (folder / "__init__.py").write_text("from peft.utils import integrations, other")
    (folder / "utils" / "__init__.py").touch()
    (folder / "utils" / "integrations.py").write_text("def dequantize_module_weight(module): return module.weight")
    (folder / "utils" / "other.py").write_text("def transpose(weight, fan_in_fan_out): return weight")
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(peft_support, "_substituted", set())
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        del sys.modules[name]


def substituted() -> set[str]:
    return {function.__name__ for function in peft_support._substituted}


BOTH = {"dequantize_module_weight", "transpose"}


def test_peft_that_is_imported_later_is_substituted_then(later_peft: Path) -> None:
    finders = list(sys.meta_path)
    assert not make_dora_traceable() and not make_dora_traceable()
    assert len(sys.meta_path) == len(finders) + 1
    found = importlib.util.find_spec("peft")
    assert found is not None and found.origin == str(later_peft / "__init__.py")
    assert not substituted() and "peft" not in sys.modules, "it was looked for alone"

    peft = importlib.import_module("peft")
    assert substituted() == BOTH
    assert sys.meta_path == finders
    assert type(peft.__loader__).__name__ == "SourceFileLoader" and "exec_module" not in vars(peft.__loader__)
    assert importlib.reload(peft) is peft and make_dora_traceable()


def test_an_import_that_fails_is_waited_for_again(later_peft: Path) -> None:
    source = (later_peft / "__init__.py").read_text()
    (later_peft / "__init__.py").write_text("raise ImportError('not today')")
    assert not make_dora_traceable()
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("peft")
    (later_peft / "__init__.py").write_text(source + "  # mended")
    importlib.invalidate_caches()
    importlib.import_module("peft")
    assert substituted() == BOTH


def test_other_finders_are_asked(later_peft: Path) -> None:
    """One that asks all others, as post-import hooks do, and one that finds PEFT itself."""
    asked = []

    class Asking:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            asked.append(name)
            return importlib.util.find_spec(name) if asked.count(name) == 1 else None

    sys.meta_path.insert(0, Asking())
    assert not make_dora_traceable()
    importlib.import_module("peft")
    assert "peft" in asked and substituted() == BOTH


def test_a_package_without_the_helpers_is_imported_as_it_is(later_peft: Path) -> None:
    (later_peft / "__init__.py").write_text("answer = 42")
    assert not make_dora_traceable()
    assert importlib.import_module("peft").answer == 42
    assert not substituted()
