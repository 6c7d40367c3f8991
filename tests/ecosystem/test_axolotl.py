"""The plugin of Axolotl: against the interface that it is written for, and in a run where Axolotl is installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import nn

from checkpoints import question_rows, save_checkpoint, write_rows
from sparse_compile import SparseLoRACallback

PLUGIN = "sparse_compile.ecosystem.axolotl.SparseLoRAPlugin"
INSTALLED = importlib.util.find_spec("axolotl") is not None


class BasePlugin:
    """The hooks of Axolotl's `BasePlugin` that the plugin has (`axolotl/integrations/base.py`, release 0.19).

    `register` is called with the file as it was read, before it is validated; `get_input_args` names a pydantic class
    whose fields are added to those that Axolotl knows; `post_trainer_create` is called in training alone.
    """

    def register(self, cfg: dict) -> None: ...  # type: ignore[type-arg]

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


HOOKS = ("register", "get_input_args", "post_trainer_create")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the plugin's module, on the interface as this file has it, whether Axolotl is installed or not."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    name = PLUGIN.rpartition(".")[0]
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_plugin_has_the_signatures_of_the_interface(module: ModuleType) -> None:
    for hook in HOOKS:
        assert parameters(getattr(module.SparseLoRAPlugin, hook)) == parameters(getattr(BasePlugin, hook))


@pytest.mark.skipif(not INSTALLED, reason="Axolotl is not installed")
def test_the_interface_is_that_of_axolotl() -> None:
    real = importlib.import_module("axolotl.integrations.base").BasePlugin
    assert {hook: parameters(getattr(real, hook)) for hook in HOOKS} == {
        hook: parameters(getattr(BasePlugin, hook)) for hook in HOOKS
    }


def test_the_block_of_a_file_is_a_field_that_keeps_what_is_written(module: ModuleType) -> None:
    package, _, name = module.SparseLoRAPlugin().get_input_args().rpartition(".")
    fields = getattr(importlib.import_module(package), name)
    block = {"preset": "o2", "layer_sparsity": {"layers.0.mlp": 0.5}}
    assert fields(sparselora=block).sparselora == block
    assert fields().sparselora is None


def test_axolotls_fused_adapters_stay_off(module: ModuleType) -> None:
    cfg: dict[str, Any] = {"plugins": [PLUGIN], "sparselora": {"preset": "o1"}, "lora_o_kernel": False}
    module.SparseLoRAPlugin().register(cfg)
    assert {kernel: cfg[kernel] for kernel in module.ADAPTER_KERNELS} == dict.fromkeys(module.ADAPTER_KERNELS, False)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"sparselora": {"target_sparsity": 0.9}}, r"unknown option 'target_sparsity' \(did you mean 'layer_sparsity'"),
        ({"sparselora": {"enabled": False, "preset": "o9"}}, "preset must be one of"),
        ({"sparselora": "o2"}, "a block of options"),
        ({"torch_compile": True}, "leave torch_compile out"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel hides adapters"),
        ({"plugins": ["axolotl.integrations.sparselora.SparseLoRAPlugin", PLUGIN]}, "two plugins read the block"),
    ],
)
def test_a_wrong_file_is_an_error_before_anything_is_loaded(
    module: ModuleType, cfg: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module.SparseLoRAPlugin().register(cfg)


@pytest.mark.parametrize("block", [None, {}, {"preset": "o2", "start_step": None}, {"enabled": True}])
def test_the_model_of_the_trainer_is_compiled_and_the_schedule_is_told(module: ModuleType, block: Any) -> None:
    callbacks: list[Any] = []
    trainer = SimpleNamespace(model=nn.Linear(2, 2), add_callback=callbacks.append)
    module.SparseLoRAPlugin().post_trainer_create({"sparselora": block}, trainer)
    assert trainer.model._compiled_call_impl is not None
    assert [type(callback) for callback in callbacks] == [SparseLoRACallback]


def test_a_block_that_is_switched_off_changes_nothing(module: ModuleType) -> None:
    cfg: dict[str, Any] = {"sparselora": {"enabled": False}, "torch_compile": True}
    trainer = SimpleNamespace(model=nn.Linear(2, 2), add_callback=pytest.fail)
    module.SparseLoRAPlugin().register(cfg)
    module.SparseLoRAPlugin().post_trainer_create(cfg, trainer)
    assert cfg == {"sparselora": {"enabled": False}, "torch_compile": True}
    assert trainer.model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="Axolotl is not installed")
@pytest.mark.parametrize("packing", [False, True])
def test_a_run_of_axolotl_is_sparse(packing: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", layers=3)
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in question_rows(16)
    ]
    write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    settings = {
        "plugins": [PLUGIN], "sparselora": {"layer_sparsity": {"layers.0.mlp": 0.5}, "start_step": 0},
        "base_model": "model", "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}], "chat_template": "chatml",
        "sequence_len": 64, "sample_packing": packing, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 3, "learning_rate": 0.01, "optimizer": "adamw_torch", "lr_scheduler": "constant",
        "val_set_size": 0, "bf16": False, "tf32": False, "dataset_num_proc": 1, "output_dir": "out",
        "dataset_prepared_path": "prepared",
    }  # fmt: skip
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    # Axolotl reports its use to its makers, unless it is told not to; and it has files saved by processes of their own.
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "SPARSELORA_LOG": "1"}
    code = "from axolotl.cli.train import do_cli\nif __name__ == '__main__':\n    do_cli('run.yml')\n"
    (tmp_path / "run.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert re.search(r"sparselora: 1 of 6 sites sparse", said), said[-6000:]
    assert "UserWarning: sparselora" not in said
    assert list((tmp_path / "out").glob("adapter_model.safetensors"))
