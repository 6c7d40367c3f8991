"""Activation checkpointing: whatever is recomputed in the backward is what the forward computed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from decoder import rope
from models import ALL_TARGETS, Fp64Decoder, batch, fp64_decoder, gradients, tiny_llama, with_lora
from oracle import (
    SPARSITY,
    Step,
    assert_differs,
    assert_same_step,
    kept_from,
    oracle_step,
    sparse_step,
    told,
    train_step,
)
from sparse_compile import SparseLoRACallback, SparseLoRAConfig, explain, token_roles
from sparse_compile.ecosystem.checkpointing import without_input_hooks
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.torch_private.modules import forward_hooks
from sweeps import slow
from tolerances import Tolerance, assert_close_rms

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", options={"layer_sparsity": SPARSITY, "strict": True, **options})


def checkpointed_llama(use_reentrant: bool) -> nn.Module:
    """A PEFT model with checkpointing as a training script enables it: its hook cuts the graph behind the embedding."""
    model = with_lora(tiny_llama(layers=2, dtype=torch.float64), ALL_TARGETS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def roles_around(call: Callable[..., Any]) -> Callable[..., Any]:
    """Give the roles for the forward alone: the backward runs when the block has closed."""

    def forward(**inputs: Tensor) -> Any:
        with token_roles(labels=inputs["labels"]):
            return call(**inputs)

    return forward


# --- One graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [slow(True, id="re-entrant"), pytest.param(False, id="non-re-entrant")])
def test_without_the_hook_it_is_one_sparse_graph(use_reentrant: bool, aot_eager_inductor: Any) -> None:
    model = checkpointed_llama(use_reentrant)
    inputs = batch(97, padding="right")
    expected_dense = train_step(model, model, inputs)
    model.disable_input_require_grads()
    step, kept = sparse_step(model, compiled(model), inputs)
    assert aot_eager_inductor.sparse == [True]
    model.enable_input_require_grads()
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64)
    assert_differs(step, expected_dense)


# --- Memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, int]:
    """Run a forward; return its value, and the bytes of what autograd saved beside the model's parameters."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.slow
def test_a_checkpoint_saves_roles_and_choices_beside_its_input(aot_eager_inductor: Any) -> None:
    inputs = batch(97)
    saved = {}
    for name, options in (("dense", {"layer_sparsity": {}}), ("sparse", {})):
        torch._dynamo.reset()
        model = checkpointed_llama(use_reentrant=False)
        model.disable_input_require_grads()
        call = compiled(model, **options)
        with record_channels() as record:
            outputs, saved[name] = saved_bytes(model, lambda call=call: call(**inputs))
        outputs.loss.backward()
    assert aot_eager_inductor.sparse == [False, True]
    indices = inputs["labels"].numel() + sum(len(choices[0]) for choices in record.values())
    # Each of three vectors of rows has one more slot, for what it leaves out.
    assert saved["sparse"] <= saved["dense"] + 8 * (indices + 3)
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    assert saved["sparse"] < 0.4 * saved_bytes(model, lambda: compiled(model)(**inputs))[1]


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [
        ("Stack", {}, {"reorder_for_peak_memory": False}),
        ("Stack", {"reorder_for_peak_memory": True}, {"reorder_for_peak_memory": True}),
        ("ModuleList", {}, {}),
    ],
)
def test_recomputations_stay_where_they_are_needed(
    layers: str, given: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any], mode: str | None) -> Any:
        seen.append(dict(options))
        return gm.forward

    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compiler)
    model, inputs = fp64_decoder(layers=2), batch(61)
    options = {"layer_sparsity": {"layers.0.mlp": 0.6}, "inductor": given}
    if layers == "Stack":
        through_stack(model, compiled(Stack(model), **options))(**inputs)
    else:
        compiled(model, **options)(**inputs)
    assert seen == [expected]


# --- Given roles ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])
def test_with_the_hook_and_roles_the_decoder_stack_is_sparse(use_reentrant: bool, aot_eager_inductor: Any) -> None:
    model = checkpointed_llama(use_reentrant)
    inputs = batch(97, padding="right")
    with told() as messages:
        step, kept = sparse_step(model, roles_around(compiled(model)), inputs)
    assert messages == []
    assert aot_eager_inductor.sparse == [False, True, False]
    assert len(kept) == len(SPARSITY)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64)


class Stack(nn.Module):
    """The blocks of a decoder and nothing else: the first operator of its graph belongs to a checkpoint."""

    def __init__(self, model: Fp64Decoder) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, None, use_reentrant=False)
        return x


def through_stack(model: Fp64Decoder, stack: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Run a decoder with its blocks by `stack`, which alone sees the roles."""

    def forward(input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        x = model.embed_tokens(input_ids)
        positions = rope(torch.arange(input_ids.shape[1])[None], model.config.head_dim, x.dtype)
        with token_roles(labels=labels):
            x = stack(x, *positions)
        logits = model.lm_head(model.norm(x))
        return (F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)),)

    return forward


@pytest.mark.slow
def test_roles_closed_before_the_backward(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    step, kept = sparse_step(model, through_stack(model, compiled(Stack(model))), inputs)
    assert kept.keys() == SPARSITY.keys()
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


@pytest.mark.slow
def test_inductor_recomputes_what_the_forward_chose() -> None:
    """The same, compiled for real: what the partitioner saves reaches the generated backward."""
    # Each adapter costs kernels, whose compilation is all of the time: one on each side of what is chosen.
    model = fp64_decoder(layers=1, adapters=("gate_proj", "down_proj"))
    inputs = batch(61)
    call = compiled(Stack(model), layer_sparsity={"layers.0.mlp": 0.6})
    step, kept = sparse_step(model, through_stack(model, call), inputs)
    assert len(kept) == 1
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("open_in_backward", [False, True])
def test_two_forwards_with_roles_of_their_own_before_one_backward(
    open_in_backward: bool, aot_eager_inductor: Any
) -> None:
    """Each recomputation reads the roles of its own forward: neither those of the other nor those open now."""
    model = fp64_decoder(layers=2)
    call = through_stack(model, compiled(Stack(model)))
    batches = [batch(61, seed=seed, prompts=prompts) for seed, prompts in enumerate(([3, 9, 12], [11, 2, 7]))]
    with record_channels() as record:
        losses = [call(**inputs)[0] for inputs in batches]
    chosen = [kept_from({site: choices[i] for site, choices in record.items()}) for i in (0, 1)]
    newer = token_roles(output_mask=torch.ones(3, 16, dtype=torch.bool)) if open_in_backward else nullcontext()
    with newer, record_channels() as again:
        sum(losses).backward()
    assert not again, "a choice was made again in the backward"
    actual = Step(sum(losses).detach(), gradients(model))
    steps = [oracle_step(model, kept, inputs) for kept, inputs in zip(chosen, batches, strict=True)]
    expected = {name: steps[0].gradients[name] + steps[1].gradients[name] for name in steps[0].gradients}
    assert_same_step(actual, Step(steps[0].loss + steps[1].loss, expected), torch.float64)
    assert aot_eager_inductor.runs == [2]


# --- Neither ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "another model is sparse"])
def test_with_the_hook_alone_it_is_dense_and_one_warning_says_why(
    elsewhere: bool, aot_eager_inductor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SparseLoRAConfig(layer_sparsity=SPARSITY, strict=True)
    monkeypatch.setattr("sparse_compile.compiler.notices._matched", {config} if elsewhere else set())
    model = checkpointed_llama(use_reentrant=True)
    inputs = batch(97)
    call = compiled(model)
    with told() as messages:
        steps = [train_step(model, call, inputs) for _ in range(3)]
    assert not any(aot_eager_inductor.sparse)
    assert_same_step(steps[-1], train_step(model, model, inputs), torch.float64, tolerance=HF_FP64)
    (message,) = messages
    assert ("stay dense" if elsewhere else "training runs dense") in message
    for way_out in ("model.disable_input_require_grads()", "SparseLoRACallback", "token_roles(labels=...)"):
        assert way_out in message


@pytest.mark.slow
def test_explain_of_a_model_that_is_cut_behind_its_embedding() -> None:
    model = checkpointed_llama(use_reentrant=True)
    report = explain(model, **batch(97), config={"layer_sparsity": SPARSITY})
    assert len(report.sites) == len(SPARSITY) and not any(site.sparsity for site in report.sites)
    assert any("disable_input_require_grads" in rejection.reason for rejection in report.rejections)


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run of the trainer gave: losses, and where the adapters ended."""

    losses: list[float]
    parameters: dict[str, Tensor]


STEPS = 3


def run_trainer(model: nn.Module, folder: Path, **arguments: Any) -> Run:
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, use_cpu=True, **arguments,
    )  # fmt: skip
    rows = batch(97, rows=8, length=12)
    data = [{name: values[i] for name, values in rows.items()} for i in range(8)]
    trainer = Trainer(model, settings, train_dataset=data, callbacks=[SparseLoRACallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return Run(losses, trained)


def llama(dtype: torch.dtype = torch.float64, *, compiled: bool = True) -> nn.Module:
    model = with_lora(tiny_llama(layers=2, dtype=dtype), ALL_TARGETS)
    if compiled:
        model.compile(backend="sparselora", options={"layer_sparsity": SPARSITY, "start_step": 0, "strict": True})
    return model


def checkpointing(use_reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def hooks_of(model: nn.Module) -> int:
    return sum(len(forward_hooks(module)) for module in model.modules())


def reentrant(model: nn.Module) -> set[object]:
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    return {function.keywords.get("use_reentrant") for function in functions if function is not None}


@pytest.mark.slow
def test_trainer_with_the_callback(tmp_path: Path, aot_eager_inductor: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = run_trainer(llama(), tmp_path)
    start = dict(llama(compiled=False).named_parameters())
    caplog.set_level(logging.INFO, "sparse_compile.ecosystem.checkpointing")
    for use_reentrant in (True, False):
        torch._dynamo.reset()
        caplog.clear()
        model = llama()
        with told() as messages, record_channels() as record:
            actual = run_trainer(model, tmp_path, **checkpointing(use_reentrant))
        assert messages == []
        assert {len(choices) for choices in record.values()} == {STEPS}, "a choice was made again in a recomputation"
        assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
        for name, value in expected.parameters.items():
            # Parameters move by their gradients.
            moved, wanted = actual.parameters[name] - start[name], value - start[name]
            assert wanted.any()
            assert_close_rms(moved, wanted, tolerance=HF_FP64, name=name)
        (told_once,) = [record for record in caplog.records if record.name == "sparse_compile.ecosystem.checkpointing"]
        assert "took off the hook" in told_once.message
        # All is as the trainer had left it.
        assert hooks_of(model) == 1 and reentrant(model) == {use_reentrant}
        model.disable_input_require_grads()
        assert hooks_of(model) == 0
    assert aot_eager_inductor.sparse == [True] * 3, "one graph each, sparse"
    marked = [any("ac_graph_id" in node.meta for node in gm.graph.nodes) for gm in aot_eager_inductor.graphs]
    assert marked == [False, True, True]


@pytest.mark.slow
def test_trainer_with_bf16_autocast(tmp_path: Path, aot_eager_inductor: Any) -> None:
    expected = run_trainer(llama(torch.float32), tmp_path, bf16=True)
    torch._dynamo.reset()
    with told() as messages, record_channels() as record:
        actual = run_trainer(llama(torch.float32), tmp_path, bf16=True, **checkpointing(use_reentrant=True))
    assert messages == []
    # Every step of both runs was compiled and sparse. How often a run compiles is held in test_recompilation.
    assert all(aot_eager_inductor.sparse) and sum(aot_eager_inductor.runs) == 2 * STEPS
    assert {len(choices) for choices in record.values()} == {STEPS}
    assert actual.losses == pytest.approx(expected.losses, rel=2e-2)


# --- Hooks ------------------------------------------------------------------------------------------------------------


def hooked_llama(use_reentrant: bool = True, *, backend: str | None = "sparselora") -> nn.Module:
    model = checkpointed_llama(use_reentrant)
    if backend is not None:
        model.compile(backend=backend)
    return model


def test_runs_that_end_in_an_error_leave_nothing_behind() -> None:
    model, callback = hooked_llama(), SparseLoRACallback()
    arguments = (TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    for _ in range(2):  # no `on_train_end` between
        callback.on_train_begin(*arguments, model=model)
        assert hooks_of(model) == 0 and reentrant(model) == {False}
    callback.on_train_end(*arguments)
    assert hooks_of(model) == 1 and reentrant(model) == {True}


@pytest.mark.parametrize("wrapped", [False, True])
def test_however_often_the_hook_was_put_on(wrapped: bool) -> None:
    # PEFT hooks a model that checkpoints already, and the handle of the first hook is lost.
    model = tiny_llama(layers=2)
    model.gradient_checkpointing_enable()
    model = with_lora(model)
    assert hooks_of(model) == 2
    if wrapped:
        model = torch.compile(model, backend="sparselora")
    else:
        model.compile(backend="sparselora")
    with without_input_hooks(model):
        assert hooks_of(model) == 0
    assert hooks_of(model) == 2


def test_blocks_that_run_eagerly_train_without_the_hook() -> None:
    model = hooked_llama()
    inputs = batch(97)
    expected = train_step(model, model._call_impl, inputs)
    with without_input_hooks(model):
        assert hooks_of(model) == 0
        actual = train_step(model, model._call_impl, inputs)
    assert_same_step(actual, expected, torch.float64)


def test_hooks_that_do_more_stay() -> None:
    model, seen = hooked_llama(), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad_(True)))
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(False))
    embedding.register_forward_hook(lambda module, args, output: module.requires_grad_(True))
    embedding.register_forward_hook(lambda module, args, kwargs, output: output.requires_grad_(), with_kwargs=True)
    with without_input_hooks(model):
        assert hooks_of(model) == 4
    assert hooks_of(model) == 5


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_hooks_of_models_that_are_not_compiled_for_this_backend_stay(backend: str | None) -> None:
    model = hooked_llama(backend=backend)
    with without_input_hooks(model):
        assert hooks_of(model) == 1 and reentrant(model) == {True}


def test_hooks_of_models_with_checkpoints_of_their_own_stay(caplog: pytest.LogCaptureFixture) -> None:
    def own_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=True, **kwargs)

    caplog.set_level(logging.INFO, "sparse_compile.ecosystem.checkpointing")
    model = hooked_llama()
    model.get_base_model().model.layers[0]._gradient_checkpointing_func = own_checkpoint
    with without_input_hooks(model):
        assert hooks_of(model) == 1
    assert "not torch.utils.checkpoint.checkpoint" in caplog.text


def test_hooks_of_models_that_are_not_of_transformers_stay() -> None:
    model = fp64_decoder(layers=2)
    model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    model.compile(backend="sparselora")
    with without_input_hooks(model):
        assert hooks_of(model) == 1


def test_what_is_set_meanwhile_is_kept() -> None:
    model = hooked_llama()
    undo = without_input_hooks(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "debug": False})
    undo.close()
    assert reentrant(model) == {False}


def test_hooks_that_a_trainer_sets_anew_in_each_step_stay_off(caplog: pytest.LogCaptureFixture) -> None:
    # TRL's DPO switches checkpointing off and on again around the forward of its reference.
    caplog.set_level(logging.INFO, "sparse_compile.ecosystem.checkpointing")
    model, callback = hooked_llama(), SparseLoRACallback()
    run = (TrainingArguments(use_cpu=True), TrainerState(max_steps=3), TrainerControl())
    callback.on_train_begin(*run, model=model)
    for begin in (callback.on_step_begin, callback.on_substep_end, callback.on_step_begin):
        begin(*run)
        assert hooks_of(model) == 0 and reentrant(model) == {False}
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        assert hooks_of(model) == 1
    callback.on_step_begin(*run)
    callback.on_train_end(*run)
    assert hooks_of(model) == 1 and reentrant(model) == {True}
    assert caplog.text.count("took off the hook") == 1


# --- Activation memory budget -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "least"), [pytest.param(False, 0.4, id="roles of the loss"), slow(True, 0.0, id="closed roles")]
)
def test_a_memory_budget_recomputes_no_choice_and_no_roles(given: bool, least: float, aot_eager_inductor: Any) -> None:
    from torch._functorch import config

    model, inputs = fp64_decoder(layers=2), batch(61)
    everything = 0
    for budget in (1.0, least):
        torch._dynamo.reset()
        with config.patch(activation_memory_budget=budget), record_channels() as record:
            call = compiled(model)
            if given:
                with token_roles(labels=inputs["labels"]):
                    logits, saved = saved_bytes(model, lambda call=call: call(inputs["input_ids"])[1])
                loss = F.cross_entropy(logits[:, :-1].reshape(-1, 61), inputs["labels"][:, 1:].reshape(-1))
            else:
                loss, saved = saved_bytes(model, lambda call=call: call(**inputs)[0])
            with token_roles(output_mask=torch.ones(3, 16, dtype=torch.bool)):
                loss.backward()
        step = Step(loss.detach(), gradients(model))
        assert {len(choices) for choices in record.values()} == {1}, "a choice was made again in the backward"
        kept = kept_from({site: choices[0] for site, choices in record.items()})
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=f"budget {budget}")
        everything = everything or saved
        assert budget == 1.0 or saved < 0.7 * everything
    assert all(aot_eager_inductor.sparse)


@pytest.mark.slow
def test_the_example_of_the_documentation(repo_root: Path, aot_eager_inductor: Any) -> None:
    from torch._functorch import config

    blocks = re.findall(
        "```python\n(.*?)```", (repo_root / "docs" / "memory.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (example,) = (block for block in blocks if "activation_memory_budget = 0.4" in block)
    saved = []
    for code in (example, example.replace("= 0.4", "= 1.0")):
        torch._dynamo.reset()
        model = with_lora(tiny_llama(layers=2), ALL_TARGETS)
        with config.patch(activation_memory_budget=1.0), told():
            saved.append(
                saved_bytes(model, lambda code=code, model=model: exec(code, {"model": model, "batch": batch(97)}))[1]
            )
        assert all(gradient.any() for gradient in gradients(model).values())
    assert saved[0] < 0.9 * saved[1]
