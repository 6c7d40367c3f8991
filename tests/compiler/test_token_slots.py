"""Graphs of fixed sizes, by `token_bucket` and `token_capacity`: against the oracle, and how often they compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils.checkpoint import checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments

from graphs import Head, capture, graph_eager, run_passes, targets, tokens
from models import batch, fp64_decoder
from oracle import SPARSITY, assert_same_step, oracle_step, sparse_step, told, train_step
from sparse_compile import Schedule, SparseLoRACallback, SparseLoRAConfig, token_roles
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.kernels.token_rows.capacity import check_on_device
from sparse_compile.training.token_capacity import CAPACITIES, known_tokens
from sweeps import slow

B = 8
PROMPTS = {
    # Output tokens of three sequences of 16: each prompt of p leaves 17 - p, where 0 < p < 16.
    "one sequence": (2, [16, 16, 15]),
    "C - 1": (7, [16, 13, 14]),
    "exactly C": (8, [16, 13, 13]),
    "C + 1": (9, [16, 12, 13]),
    "ragged": (24, [9, 9, 9]),
    "all": (48, [0, 0, 0]),
}


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    options = {"layer_sparsity": SPARSITY, "strict": True, **options}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


def batches() -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    for name, (outputs, prompts) in PROMPTS.items():
        yield name, outputs, batch(61, prompts=prompts)


def test_every_split_equals_the_oracle_and_a_bucket_compiles_once(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=3)
    call = compiled(model, preset="exact", token_bucket=B)
    seen: dict[int, None] = {}
    for name, outputs, inputs in batches():
        with token_roles(labels=inputs["labels"]) as roles:
            assert int(roles.sum()) == outputs
            step, kept = sparse_step(model, call, inputs)
        assert kept.keys() == SPARSITY.keys()
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=name)
        seen[-(-outputs // B)] = None
        assert len(eager_inductor.graphs) == len(seen), f"{name}: another bucket compiles, the same one does not"
    assert len(seen) == 4 < len(PROMPTS)
    called = {op for gm in eager_inductor.graphs for op in targets(gm)}
    assert {"token_slots", "loss_slots"} <= called and not called & {"split_tokens", "loss_rows"}


def test_a_batch_without_output_tokens(eager_inductor: Any) -> None:
    """Its mean is of nothing; the sum of such a loss, and the gradients, are zero."""
    body = _ffn_body()
    inputs = tokens(context=6)
    model = Head(body, loss=lambda logits, labels: nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"))  # fmt: skip
    call = torch.compile(
        model, backend="sparselora", options={"layer_sparsity": {"body.0": 0.5}, "token_bucket": 4, "strict": True}
    )
    with known_tokens(inputs[1]), record_channels() as record:
        loss = call(*inputs)
    loss.backward()
    assert record and loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_capacity_compiles_once_and_names_what_overflows(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=3)
    call = compiled(model, preset="exact", token_capacity=24)
    for name, outputs, inputs in batches():
        if outputs > 24:
            with pytest.raises(RuntimeError, match=r"token_capacity: this batch has 48 output tokens, .* slots for 24"):
                call(**inputs)
            continue
        step, kept = sparse_step(model, call, inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=name)
    assert len(eager_inductor.graphs) == 1


@pytest.mark.slow
def test_lengths_that_vary_share_the_graph_of_a_bucket(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=1)
    sites = {"layers.0.mlp": 0.6, "layers.0.self_attn": 0.5}
    options = {"preset": "exact", "layer_sparsity": sites, "token_bucket": 32}
    call = torch.compile(model, backend="sparselora", dynamic=True, options=options)
    for seed, shape in enumerate(({"length": 16}, {"length": 19, "prompts": [19, 12, 18]})):
        inputs = batch(61, seed=seed, **shape)  # type: ignore[arg-type]
        with known_tokens(inputs["labels"]):
            step, kept = sparse_step(model, call, inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=str(shape))
    assert len(aot_eager_inductor.graphs) == 1


@pytest.mark.parametrize("mode", [4, slow("all"), slow("mean")])
def test_predictors_choose_the_same_channels(mode: str | int, eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61, padding="left")
    chosen = []
    for options in ({}, {"token_bucket": 32}):
        torch._dynamo.reset()
        with known_tokens(inputs["labels"]), record_channels() as record:
            compiled(model, preset="none", predictor_tokens=mode, **options)(**inputs)
        chosen.append({site: found[0].tolist() for site, found in record.items()})
    assert chosen[0] == chosen[1] != {}
    assert [("token_slots" in targets(gm)) for gm in eager_inductor.graphs] == [False, True]


# --- No host --------------------------------------------------------------------------------------------------------


class _Bodies(fx.Interpreter):
    """Runs a graph with the bodies of our ops in place of their fakes."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "_name", getattr(target, "name", lambda: "")() if callable(target) else "")
        if str(name).startswith("sparselora::"):
            body = torch._library.custom_ops.OPDEFS[str(name).split(".")[0]]._init_fn
            return body(*args, **kwargs)
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("options", [{"token_bucket": 32}, {"token_capacity": 32}, {}], ids=str)
def test_no_op_of_a_step_needs_the_host(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole graph on stand-ins that refuse data-dependent sizes and numbers; without options it fails."""
    found: list[fx.GraphModule] = []

    def compile_and_keep(gm: fx.GraphModule, example_inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
        found.append(gm)
        return graph_eager(gm, example_inputs)

    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compile_and_keep)
    monkeypatch.setattr("sparse_compile.kernels.channel_selection.op._degenerate", {})
    inputs = batch(61, padding="left")
    with known_tokens(inputs["labels"]):
        compiled(fp64_decoder(layers=2), preset="exact", **options)(**inputs)
    (gm,) = found
    for module in ("token_rows", "loss_rows"):
        # A GPU compares by itself; on a CPU there is nothing to wait for.
        monkeypatch.setattr(f"sparse_compile.kernels.{module}.op.check_slots", check_on_device)
    monkeypatch.setattr("sparse_compile.kernels.channel_selection.op._degenerate", {})
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        stand_ins = [
            torch.empty(value.shape, dtype=value.dtype)
            for value in (node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder")
        ]
        for name, buffer in list(gm.named_buffers()):
            setattr(gm, name, mode.from_tensor(buffer))
        if options:
            assert _Bodies(gm).run(*stand_ins)[0].shape == ()
        else:
            with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
                _Bodies(gm).run(*stand_ins)


# --- Checkpoints and the dense phase ----------------------------------------------------------------------------------


class _Checkpointed(nn.Module):
    """A decoder whose blocks are checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for layer in model.layers:  # type: ignore[union-attr]
            layer.forward = self._checkpointed(layer.forward)

    @staticmethod
    def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: checkpoint(forward, *args, use_reentrant=False)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def test_slots_are_saved_for_the_backward_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    traced: dict[str, fx.GraphModule] = {}

    def compiler(name: str) -> Callable[..., Any]:
        def compile_and_keep(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            traced[name] = gm
            return make_boxed_func(gm.forward)

        return compile_and_keep

    def compile_ahead(gm: fx.GraphModule, example_inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
        partition = min_cut_rematerialization_partition
        backend = aot_autograd(
            fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), partition_fn=partition
        )
        return backend(gm, list(example_inputs))

    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compile_ahead)
    model = _Checkpointed(fp64_decoder(layers=2))
    inputs = batch(61, padding="left")
    call = compiled(model, preset="none", token_bucket=B)
    with known_tokens(inputs["labels"]):
        step, kept = sparse_step(model, call, inputs)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)
    made = {name: {str(node.target) for node in gm.graph.nodes} for name, gm in traced.items()}
    assert "sparselora.token_slots.default" in made["forward"] - made["backward"]
    assert "sparselora.top_channels.default" in made["forward"] - made["backward"]
    assert "sparselora.take_rows.default" in made["backward"]
    for gm in traced.values():
        values = [node.meta["val"] for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert values and not any(free_unbacked_symbols(value) for value in values)


def _ffn_body() -> nn.Module:
    from decoder import MLP, DecoderConfig

    return MLP(DecoderConfig(hidden=8, ffn=12))


def test_a_dense_step_has_a_slot_for_every_token_and_none_for_context() -> None:
    model, inputs = Head(_ffn_body()), tokens(context=0)
    config = SparseLoRAConfig(layer_sparsity={"body.0": 0.5}, token_capacity=5, preset="none")
    captured = capture(model, *inputs, config=config)
    captured.ctx.env = replace(captured.ctx.env, all_output=True)
    run_passes(
        captured, "canonicalize_linears", "find_projections", "find_ffn", "find_attention", "trace_roles",
        "plan_token_slots", "plan_sparsity", "insert_predictors", "sparsify_ffn",
    )  # fmt: skip
    slots = next(node for node in captured.gm.graph.nodes if "token_slots" in str(node.target))
    assert slots.args[2] == 0 and "numel" in str(slots.args[1])
    assert "take_rows" in targets(captured.gm)
    placeholders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    by_path = dict(model.named_parameters()) | dict(model.named_buffers())
    values = [
        by_path[captured.ctx.env.parameters[node.name].path] if node.name in captured.ctx.env.parameters
        else next(each for each, hint in zip(inputs, ("input_ids", "labels"), strict=True) if hint in node.name)
        for node in placeholders
    ]  # fmt: skip
    torch.testing.assert_close(captured.gm(*values)[0], model(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_each_phase_has_a_graph_of_its_own(eager_inductor: Any) -> None:
    """A dense step has a slot for every token, a sparse one has not: sizes decide, and the phase is guarded."""
    model, inputs, schedule = fp64_decoder(layers=3), batch(61, prompts=[16, 13, 14]), Schedule()
    call = compiled(model, preset="exact", token_capacity=B, start_step=1, end_step=2, schedule=schedule)
    for step, graphs in ((0, 1), (1, 2), (2, 2), (1, 2)):
        schedule.step = step
        found, kept = sparse_step(model, call, inputs)
        assert bool(kept) == (step == 1)
        assert_same_step(found, oracle_step(model, kept, inputs), torch.float64, what=f"step {step}")
        assert len(eager_inductor.graphs) == graphs


# --- Where the count comes from ---------------------------------------------------------------------------------------


def test_without_a_count_sizes_depend_on_data_and_one_warning_says_so(eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    call = compiled(model, preset="exact", token_bucket=B)
    with told() as messages:
        for _ in range(2):
            step, kept = sparse_step(model, call, inputs)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)
    (message,) = messages
    assert "nothing tells how many output tokens" in message and "token_roles(labels=...)" in message
    with known_tokens(inputs["labels"]):
        sparse_step(model, call, inputs)
    assert [("split_tokens" in targets(gm)) for gm in eager_inductor.graphs] == [True, False]


def test_labels_that_were_counted_with_another_ignored_label_are_not_used(eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    with told() as messages, known_tokens(inputs["labels"], ignore_index=0):
        train_step(model, compiled(model, token_bucket=B), inputs)
    assert "counted with ignore_index 0, and the loss ignores -100" in messages[0]


def test_roles_beyond_the_slots_name_the_option(eager_inductor: Any) -> None:
    """The model is called with other labels than those that were counted."""
    model, inputs = fp64_decoder(layers=2), batch(61, prompts=[0, 0, 0])
    call = compiled(model, preset="none", token_bucket=B)
    fewer = batch(61, prompts=[12, 12, 12])["labels"]
    with known_tokens(fewer), pytest.raises(RuntimeError, match="token_bucket: this batch has 48 output tokens"):
        call(**inputs)


def test_blocks_nest_and_the_innermost_counts() -> None:
    from sparse_compile.training.token_capacity import announced_count, watch

    many, few = (torch.full((1, 20), label) for label in (1, -100))
    few[0, :3] = 1
    assert announced_count() is None
    keys = watch(4, 0), watch(4, 1)
    with known_tokens(many), token_roles(labels=many):
        with known_tokens(few):
            assert announced_count() == (4, 3, -100)  # by shift: the token behind the last label, or none before it
            assert [CAPACITIES[key] for key in keys] == [4, 4]
        assert announced_count() == (20, 20, None)
        assert [CAPACITIES[key] for key in keys] == [20, 20]
    assert announced_count() is None
    assert [CAPACITIES[key] for key in keys] == [0, 0]


@pytest.mark.slow
def test_the_callback_counts_the_labels_that_a_model_is_called_with(
    eager_inductor: Any, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    model = fp64_decoder(layers=2)
    model.compile(backend="sparselora", dynamic=False, options={"layer_sparsity": SPARSITY, "token_bucket": B})
    before = model._compiled_call_impl
    callback, state, control = SparseLoRACallback(), TrainerState(), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with caplog.at_level(logging.INFO, logger="sparse_compile.training.token_capacity"), told() as messages:
        callback.on_train_begin(arguments, state, control, model=model)
        for prompts in ([12, 12, 12], [12, 12, 13], [3, 12, 13]):
            inputs = batch(61, prompts=prompts)
            step, kept = sparse_step(model, model, inputs)
            assert_same_step(step, oracle_step(fp64_decoder(layers=2), kept, inputs), torch.float64, what=str(prompts))
        with torch.no_grad():
            model(**inputs)
        callback.on_train_end(arguments, state, control)
    assert model._compiled_call_impl is before
    assert not messages and not caplog.records, "labels on the CPU are counted for nothing"
    assert [("token_slots" in targets(gm)) for gm in eager_inductor.graphs] == [True, True, False]


def test_labels_on_a_device_are_counted_there_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from sparse_compile.training import token_capacity

    labels = SimpleNamespace(device=torch.device("cuda"))
    announcement = token_capacity._Announcement(labels, -100)  # type: ignore[arg-type]
    counted = []
    with (
        caplog.at_level(logging.INFO, logger="sparse_compile.training.token_capacity"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(token_capacity, "_count", lambda tensor, ignored: counted.append(tensor))
        for _ in range(2):
            announcement.count()
    assert counted == [labels, labels]
    (record,) = caplog.records
    assert "waits for it once a step" in record.message
