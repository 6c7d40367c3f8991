"""Run every example as a user does, in a tiny configuration, and use what it leaves behind."""

from __future__ import annotations

import csv
import importlib
import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from checkpoints import write_rows
from graphs import aot_eager

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--steps",
    "3",
    "--start-step",
    "1",
    "--end-step",
    "2",
    "--problems",
    "64",
    "--pretrain-steps",
    "2",
    "--layers",
    "3",
)
TINY += ("--hidden", "128", "--eval-examples", "8", "--timing-rounds", "2")
SPARSE_KINDS = ("o2", "o2-all-sparse", "o2-random-dense")
SPARSE_ARMS = tuple(f"{kind}-seed{seed}" for kind in SPARSE_KINDS for seed in (0, 1))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_is_that_of_torch_but_for_its_bf16(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    muon = importlib.import_module("finetuning.muon")
    start, *gradients = torch.randn(4, *shape).unbind()
    moved = []
    for optimizer, options in (
        (muon.Muon, {}),
        (torch.optim.Muon, {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}),
    ):
        weight = torch.nn.Parameter(start.clone())
        steps = optimizer([weight], lr=0.1, **options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            steps.step()
        moved.append(weight.detach() - start)
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()


def run_example(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example as a user does: a program of its own, compiled by Inductor, in a folder of its own."""
    # Sparse arms need factors, which belong into no cache but the test's.
    environment = {**os.environ, "SPARSELORA_CACHE_DIR": str(folder / "factors")}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


class Ran(NamedTuple):
    """What a program that ran in this process left: as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def run_here(script: str, *arguments: str, folder: Path) -> Ran:
    """Run an example in this process, its graphs op by op behind AOTAutograd, whichever the backend.

    That every line of it works needs neither imports anew nor C++; `test_train_with_trainer` has both.
    """
    path, out, err, code = ROOT / "examples" / script, StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, settings_of_transformers(), warnings.catch_warnings():
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs))
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(str(path.parent))
        patch.setenv("SPARSELORA_CACHE_DIR", str(folder / "factors"))
        patch.chdir(folder)
        torch._dynamo.reset()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                # As the interpreter ends: a message goes to stderr and is a failure.
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                print(end.code if isinstance(end.code, str) else "", file=err)
    return Ran(code, out.getvalue(), err.getvalue())


@contextmanager
def settings_of_transformers() -> Iterator[None]:
    """Put verbosity and progress bars back as they were."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo with two seeds: dense, o2 and its two ablations; return its output folder."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_here(
        "finetune.py", *TINY, "--preset", "o2", "--seeds", "0,1", "--ablations", "--out", "out", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert "above dense" in done.stdout and "standard deviation of 2 seeds" in done.stdout
    assert f"what each sparse step computes, and why: {Path('out') / 'o2.html'}" in done.stdout
    return folder / "out"


@pytest.fixture(scope="module")
def arms(demo: Path) -> dict[str, dict[str, Any]]:
    """Return what `results.json` says about each arm."""
    document = json.loads((demo / "results.json").read_text())
    assert document["environment"]["versions"]["torch"] == torch.__version__
    return {arm["name"]: arm for arm in document["arms"]}


@pytest.mark.slow
def test_demo_reports_every_arm(demo: Path, arms: Mapping[str, dict[str, Any]]) -> None:
    assert list(arms) == ["dense-seed0", "dense-seed1", *SPARSE_ARMS]
    for arm in arms.values():
        assert 0 < arm["held_out_loss"] < 10
        assert 0 <= arm["exact_match"] <= 1
        # Other seeds of a kind run the same code, and are not timed again.
        assert arm["step_seconds"] == arms[f"{arm['kind']}-seed0"]["step_seconds"]
        assert set(arm["training"]["dense_losses"]) == {"1", "2", "3"}
    assert arms["dense-seed0"]["step_seconds"]["speedup"] == 1.0
    assert (demo / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert all("<html" in (demo / f"{kind}.html").read_text().lower() for kind in SPARSE_KINDS)
    with (demo / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["arm"] == "o2-seed0"] == ["1", "2", "3"]


@pytest.mark.slow
def test_demo_arms_start_alike_and_part_where_sparsity_starts(demo: Path, arms: Mapping[str, dict[str, Any]]) -> None:
    with (demo / "losses.csv").open(newline="") as file:
        losses = {(row["arm"], row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    for name in SPARSE_ARMS:
        dense = f"dense-seed{arms[name]['seed']}"
        assert losses[name, "1"] == pytest.approx(losses[dense, "1"], rel=1e-5)
        assert losses[name, "2"] != pytest.approx(losses[dense, "2"], rel=1e-6)


@pytest.mark.slow
def test_the_dense_loss_of_a_sparse_run_is_that_of_the_dense_function(arms: Mapping[str, dict[str, Any]]) -> None:
    # The first step is dense in every arm.
    for name in SPARSE_ARMS:
        of_dense = arms[f"dense-seed{arms[name]['seed']}"]["training"]["dense_losses"]
        assert arms[name]["training"]["dense_losses"]["1"] == pytest.approx(of_dense["1"], rel=1e-5)


@pytest.mark.slow
def test_demo_sparse_arms_save_work(arms: Mapping[str, dict[str, Any]]) -> None:
    dense = arms["dense-seed0"]
    assert dense["sparse_sites"] == dense["sparse_steps"] == 0
    for name in SPARSE_ARMS:
        assert arms[name]["sparse_steps"] == 1
        assert arms[name]["sparse_sites"] > 0
        assert arms[name]["flops_of_step"] < arms[name]["flops_of_dense_step"] == dense["flops_of_step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense-seed0", "o2-seed1"])
def test_demo_adapter_loads_into_plain_peft(demo: Path, name: str) -> None:
    from safetensors.torch import load_file

    base = transformers.AutoModelForCausalLM.from_pretrained(demo / "base")
    model = peft.PeftModel.from_pretrained(base, demo / name / "adapter").eval()
    stored = load_file(demo / name / "adapter" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert stored.keys() == loaded.keys()
    assert not any("_orig_mod" in key for key in stored)
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in stored.items())
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert torch.isfinite(adapted).all()
    assert not torch.equal(adapted, plain)  # something was learned, and it arrived


@pytest.mark.slow
def test_own_model_and_chat_data(demo: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    base = transformers.AutoModelForCausalLM.from_pretrained(demo / "base")
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "How many ?"}, {"role": "assistant", "content": "1 + 1 = 2 . #### 2"}]
    write_rows(tmp_path / "chat.jsonl", [{"messages": turns * 2}] * 12)
    sizes = ("--steps", "1", "--batch-size", "2", "--eval-examples", "2", "--timing-rounds", "1")
    source = ("--model", "model", "--data", "chat.jsonl", "--presets", "dense")
    done = run_here("finetune.py", *source, *sizes, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"] == {
        "train": 10,
        "held_out": 2,
        "too_long": 0,
    }


@pytest.mark.slow
def test_train_with_trainer(tmp_path: Path) -> None:
    # One step: the second batch has another length, which compiles a second time.
    sizes = ("--steps", "1", "--pretrain-steps", "1", "--layers", "4")
    done = run_example("train_with_trainer.py", *sizes, "--out", "adapter", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").r == 16


@pytest.mark.slow
def test_inspect_passes(tmp_path: Path) -> None:
    done = run_here("inspect_passes.py", "--dump", "dump", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layers.1.mlp" in done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith("+++ ") and line.endswith("_sparsify_ffn.txt") for line in lines)
    assert any(line.startswith("+") and "sparselora" in line for line in lines)
    unknown = run_here("inspect_passes.py", "--dump", "dump", "--pass", "nonsense", folder=tmp_path)
    assert unknown.returncode == 1
    assert "no pass 'nonsense'" in unknown.stderr and "sparsify_attention" in unknown.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "m"), "--model and --data go together"),
        (("--presets", "dense,o9"), "'o9'"),
        (("--presets", "dense", "--ablations"), "ablations need a sparse preset"),
        (("--start-step", "1.5"), "start_step"),
        (("--hidden", "100"), "--hidden is a multiple of 32"),
        (("--model", "m", "--data", "absent.jsonl"), "absent.jsonl: no such file"),
    ],
)
def test_wrong_options_are_said(
    finetuning: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    from finetune import main

    with pytest.raises(SystemExit) as caught:
        main([*options, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def finetuning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the package of what the examples share, with its modules."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetuning.demo_model
    import finetuning.measure
    import finetuning.report

    return finetuning


def test_figures_are_summarised_over_seeds_and_compared_by_seed(finetuning: Any) -> None:
    def result(kind: str, seed: int, loss: float) -> Any:
        config = None if kind == "dense" else object()
        arm = SimpleNamespace(kind=kind, seed=seed, config=config)
        return finetuning.report.Result(
            SimpleNamespace(arm=arm), SimpleNamespace(loss=loss, exact_match=0.5), None, None
        )

    losses = {("dense", 0): 1.0, ("dense", 1): 3.0, ("o2", 0): 1.5, ("o2", 1): 4.5}
    dense, sparse = finetuning.report.by_kind([result(*arm, loss) for arm, loss in losses.items()])
    assert f"{dense.loss:.2f}" == "2.00 ± 1.41" and dense.above_dense is None
    assert f"{sparse.above_dense:+.2f}" == "+1.00 ± 0.71" and f"{sparse.exact_match:.0%}" == "50% ± 0%"
    (alone,) = finetuning.report.by_kind([result("o2", 0, 1.5)])
    assert f"{alone.loss:.1f}" == "1.5" and alone.above_dense is None


@pytest.mark.parametrize(
    ("text", "answer"), [("1 + 1 = 2 . #### 2", "2"), ("so\n#### 1,234 ", "1234"), (" It is\nParis. ", "It is Paris.")]
)
def test_final_answer(finetuning: Any, text: str, answer: str) -> None:
    assert finetuning.measure.final_answer(text) == answer


def test_worked_answers_are_right(finetuning: Any) -> None:
    demo_model = finetuning.demo_model
    for kind in ("owners", "stories"):
        problems = demo_model.generate(kind, 200, seed=3)
        assert problems == demo_model.generate(kind, 200, seed=3)
        assert len({problem.question for problem in problems}) == 200
        for problem in problems:
            steps, _, result = problem.answer.rpartition("####")
            words = steps.split()
            for index in (i for i, word in enumerate(words) if word == "="):
                left, sign, right, total = (words[index + offset] for offset in (-3, -2, -1, 1))
                assert int(left) + int(right) * (1 if sign == "+" else -1) == int(total)
            assert int(result) == int(total)
    with pytest.raises(ValueError, match="owners, stories"):
        demo_model.generate("nonsense", 1, seed=0)
