"""Context leaves the residual stream: a step against the oracle, its dense steps, and what its maps are fitted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoder
from exited import ExitRun, trained
from models import ALL_TARGETS, BATCHES, fp64_decoder, tiny_llama, with_lora
from oracle import assert_same_step, kept_from, train_step
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.reference import output_mask_from_labels
from sparse_compile.torch_private.inductor import compile_with_inductor
from sparse_compile.training.schedule import DENSE, SPARSE
from sweeps import sweep
from tolerances import Tolerance

pytestmark = pytest.mark.usefixtures("eager_inductor")

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")
BF16 = Tolerance(max=0.16, rms=3e-2, why="twice the table's, for sqrt(40) roundings instead of sqrt(10)")


def change(weight: Tensor) -> None:
    """Write other values to a frozen weight."""
    with torch.no_grad():
        weight.mul_(1.5)


def assert_dense(run: ExitRun, inputs: dict[str, Tensor] | None = None) -> None:
    """Assert that the step at hand is that of the eager model."""
    inputs = run.batch() if inputs is None else inputs
    expected = train_step(run.model, run.model, inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)
    assert run.session.phase == DENSE


def test_a_run(eager_inductor: Any) -> None:
    """Dense steps, sparse ones, and steps that changed weights make dense: all of one graph."""
    run = ExitRun(batches=BATCHES["left"])
    assert run.train(5) == [DENSE] * 4 + [SPARSE]
    run.check()
    assert list(run.maps) == ["layers.3.self_attn"]
    assert run.train(2) == [SPARSE] * 2
    assert_dense(run)
    assert run.train(2) == [DENSE, SPARSE]
    for layer in (run.model.layers[3].mlp.down_proj, run.model.layers[1].self_attn.q_proj):
        change(layer.base_layer.weight)
    assert run.train(1) == [SPARSE], "no map imitates a block that is below the exit, or the last one"
    change(run.model.layers[2].mlp.down_proj.base_layer.weight)
    assert_dense(run)
    phases = run.train(10)
    assert phases[0] == DENSE and SPARSE in phases
    assert len(eager_inductor.graphs) == 1 and eager_inductor.sparse == [True]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["self_attn.o_proj", "self_attn.q_proj", "mlp.gate_proj"])
def test_a_changed_layer_between_exit_and_block_makes_steps_dense(layer: str) -> None:
    run = ExitRun(fp64_decoder(layers=3), exit_=1)
    assert run.train(5)[-1] == SPARSE
    change(run.model.get_submodule(f"layers.1.{layer}").base_layer.weight)
    assert_dense(run)


def test_maps_are_fitted_to_how_the_stream_changes_and_what_the_exit_reads_of_context() -> None:
    """Each dense step hands on what hooks see, adapters as they are in that step, padding left out."""
    run = ExitRun(fp64_decoder(layers=4), exit_=1, batches={"rows": 4, "padding": "right"})
    run.call(**run.batch(0))[0].backward()
    run.optimizer.zero_grad()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, online in run.session.online_maps.items():
        online.collect = _noting(seen, name.partition("@")[0])  # type: ignore[method-assign]
    for seed in range(3):
        inputs = run.batch(seed)
        context = ~output_mask_from_labels(inputs["labels"]) & inputs["attention_mask"].bool()
        x, streams = _read(run.model, inputs)
        run.call(**inputs)[0].backward()
        assert sorted(seen) == ["layers.2.self_attn", "layers.3.self_attn"]
        for name, (read, changed) in seen.items():
            stream = streams[int(name.split(".")[1])]
            torch.testing.assert_close(read, x[context])
            torch.testing.assert_close(changed, (stream - streams[1])[context])
        run.optimizer.step()
        run.optimizer.zero_grad()


def _noting(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    return lambda x, y: seen.update({name: (x.clone(), y.clone())})


def _read(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return what the query projection of block 1 reads, and what each block reads, in an eager forward."""
    x: list[Tensor] = []
    streams: list[Tensor] = []
    hooks = [model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))]
    hooks += [each.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for each in model.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return x[0], streams


# --- Every model and option -------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    **{f"{kind} batch": (fp64_decoder, {"batches": shape}) for kind, shape in BATCHES.items()},
    "before block 1": (fp64_decoder, {"exit_": 1}),
    "before block 3": (fp64_decoder, {"exit_": 3}),
    "biases": (lambda **sizes: fp64_decoder(bias=True, **sizes), {}),
    "written out": (lambda **sizes: fp64_decoder(attention="eager", **sizes), {}),
    "written out, left": (lambda **sizes: fp64_decoder(attention="eager", **sizes), {"batches": BATCHES["left"]}),
    "enable_gqa": (lambda **sizes: fp64_decoder(attention="sdpa_gqa", **sizes), {"batches": BATCHES["left"]}),
    "no gate": (
        lambda **sizes: fp64_decoder(gated=False, region=torch.nn.functional.gelu, **sizes),
        {"batches": BATCHES["right"]},
    ),
    "no adapter on queries": (
        lambda **sizes: fp64_decoder(adapters=("k_proj", "v_proj", "down_proj"), **sizes),
        {"exit_": 1},
    ),
    "adapters on queries alone": (lambda **sizes: fp64_decoder(adapters=("q_proj",), **sizes), {}),
    "wide heads": (lambda **sizes: fp64_decoder(heads=6, kv_heads=2, head_dim=4, **sizes), {}),
    "rank one": (lambda **sizes: fp64_decoder(rank=1, **sizes), {}),
    "detached": (fp64_decoder, {"surrogate_gradient": "detached", "exit_": 1}),
    "token_capacity": (fp64_decoder, {"token_capacity": 96, "batches": BATCHES["left"]}),
    "token_capacity above all tokens": (fp64_decoder, {"token_capacity": 1000}),
    "token_bucket": (fp64_decoder, {"token_bucket": 128, "batches": BATCHES["right"]}),
    "exact passes off": (fp64_decoder, {"disable": ["order_adapter_products", "fuse_adapters"]}),
    "adapters of one read are one product": (fp64_decoder, {"disable": ["order_adapter_products"]}),
    "lowering off": (fp64_decoder, {"disable": ["lower_sparse_ops"]}),
}


@pytest.mark.parametrize("name", sweep(CASES, "before block 3"))
def test_a_sparse_step_is_that_of_the_oracle(name: str, eager_inductor: Any) -> None:
    build, options = CASES[name]
    run = ExitRun(build(layers=4), **options)
    phases = run.train(5)
    assert phases == [DENSE] * 4 + [SPARSE], phases
    assert len(run.maps) == 3 - run.exit
    run.check()
    fixed = any(option.startswith("token_") for option in options)
    assert len(eager_inductor.graphs) == (2 if fixed else 1)


@pytest.mark.slow
def test_detached_maps_and_exact_ones_have_other_gradients() -> None:
    run = ExitRun(fp64_decoder(layers=4), exit_=1)
    run.train(5)
    exact, detached = (run.oracle(run.batch(), detached=each) for each in (False, True))
    name = "layers.0.self_attn.o_proj.lora_B"
    assert (exact.gradients[name] - detached.gradients[name]).norm() > 1e-3 * exact.gradients[name].norm()


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 120])
def test_every_length_and_split_runs_one_graph(capacity: int | None, eager_inductor: Any) -> None:
    """Fixed sizes too: a batch whose sequences are shorter than there are slots."""
    run = ExitRun(dynamic=True, token_capacity=capacity)
    run.train(5)
    graphs = len(eager_inductor.graphs)
    shapes: list[dict[str, Any]] = [
        {"length": 23},
        {"rows": 5, "length": 9, "prompts": [9, 0, 3, 8, 1]},
        {"rows": 3, "prompts": [16, 16, 15]},
        {"rows": 3, "length": 40},
    ]
    for shape in shapes:
        run.check(run.batch(**shape), what=str(shape))
    assert len(eager_inductor.graphs) == graphs == (1 if capacity is None else 2)


@pytest.mark.slow
def test_a_batch_without_context_is_dense_and_one_without_outputs_has_no_loss() -> None:
    run = ExitRun()
    run.train(5)
    inputs = run.batch(prompts=[0] * 8)
    assert_same_step(run.sparse(inputs), train_step(run.model, run.model, inputs), torch.float64)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert run.call(**inputs)[0].isnan()


@pytest.mark.slow
@pytest.mark.usefixtures("maps_pay")
@pytest.mark.parametrize("shape", ["left", "packed"])
def test_maps_of_feed_forward_blocks_below_the_exit(shape: str) -> None:
    run = ExitRun(exit_=3, batches=BATCHES[shape], preset="auto", layer_sparsity=None, dense_every=4)
    assert run.train(5) == [DENSE] * 4 + [SPARSE]
    assert sorted(run.maps) == ["layers.1.mlp", "layers.2.mlp"]
    run.check()
    other = ExitRun(fp64_decoder(layers=4), 2, preset="auto", layer_sparsity=None)
    other.train(5)
    assert sorted(other.maps) == ["layers.1.mlp", "layers.3.self_attn"]
    other.check()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_channels_left_out_below_the_exit(attention: str) -> None:
    """What is asked of a site behind the exit counts no more."""
    sites = {"0.mlp": 0.6, "1.mlp": 0.9, "0.self_attn": 0.5, "1.self_attn": 0.7, "2.mlp": 0.5, "3.self_attn": 0.5}
    run = ExitRun(fp64_decoder(layers=4, attention=attention), batches=BATCHES["left"], layer_sparsity=sites)
    run.train(5)
    inputs = run.batch()
    with record_channels() as record:
        step = run.sparse(inputs)
    kept = kept_from({name: choices[0] for name, choices in record.items()})
    assert sorted(kept) == [f"layers.{i}.{kind}" for i in range(2) for kind in ("mlp", "self_attn")]
    assert_same_step(step, run.oracle(inputs, kept=kept), torch.float64)


# --- AOTAutograd, checkpoints, precision ------------------------------------------------------------------------------


class CheckpointedLayer(decoder.DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return checkpoint(super().forward, x, cos, sin, mask, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"token_capacity": 96}], ids=str)
def test_through_aot_autograd(
    options: dict[str, Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch, aot_eager_inductor: Any
) -> None:
    if checkpointed:
        monkeypatch.setattr(decoder, "DecoderLayer", CheckpointedLayer)
    # Sizes that are read of repeated heads within a checkpoint are traced as nodes, and hide the attention block.
    model = fp64_decoder(layers=3, attention="sdpa_gqa" if checkpointed else "sdpa")
    run = ExitRun(model, exit_=1, batches=BATCHES["left"], **options)
    assert run.train(5)[-1] == SPARSE
    run.check()
    assert any(aot_eager_inductor.sparse)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compile_with_inductor)
    run = ExitRun(fp64_decoder(layers=3, dtype=torch.float32), exit_=1, dynamic=dynamic, batches=BATCHES["left"])
    assert run.train(5)[-1] == SPARSE
    run.check(dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ragged", "right"])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_types(autocast: bool, shape: str) -> None:
    """A base in bf16 with fp32 adapters, and autocast around fp32."""
    model = with_lora(tiny_llama(layers=3, dtype=torch.float32 if autocast else torch.bfloat16), ALL_TARGETS)
    run = ExitRun(model, exit_=1, batches=BATCHES[shape])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert run.train(5)[-1] == SPARSE
        run.check(dtype=torch.bfloat16, tolerance=BF16)
    assert {each.dtype for each in trained(model)} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("dora", "dropout"), [(False, 0.3), (True, 0.0), (True, 0.3)])
def test_dora_and_dropout_of_adapters(dora: bool, dropout: float) -> None:
    """Dropout draws for all tokens, as the eager model does: one seed gives one result."""
    model = with_lora(tiny_llama(layers=3, dtype=torch.float64), ALL_TARGETS, dropout=dropout, dora=dora)
    run = ExitRun(model, exit_=1, batches=BATCHES["right"])
    assert run.train(5)[-1] == SPARSE
    run.check(seed=5, tolerance=HF_FP64)
