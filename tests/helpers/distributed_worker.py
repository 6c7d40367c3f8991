"""One rank of the distributed runs that `test_distributed.py` starts: `torchrun distributed_worker.py OUT`.

Each function of `CASES` trains a model in some way and returns what the test compares, as plain data. All run in one
launch, for starting Python and torch takes longer than any of them.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sparse_compile.compiler.executable as executable
import sparse_compile.compiler.notices as notices
import sparse_compile.predictor.store as factors
from decoder import Fp64Decoder, fp64_decoder
from graphs import aot_eager
from sparse_compile import Schedule, token_roles
from sparse_compile.training.label_roles import LabelRoles
from sparse_compile.training.session import session_for
from sparse_compile.training.told import IN_PROCESS

LAYERS = 2
RANKS = 2
ZERO: dict[str, Any] = {"preset": "none"}
EXACT: dict[str, Any] = {"preset": "exact"}
SPARSE: dict[str, Any] = {
    "layer_sparsity": {"layers.0.mlp": 0.75, "layers.1.self_attn": 0.5},
    "start_step": 0,
}
"""Another site in each block, so that a graph shared by alike blocks shows."""

Case = Callable[[], dict[str, Any]]
CASES: dict[str, Case] = {}


def decoder() -> Fp64Decoder:
    """The model of every case, the same on every rank."""
    return fp64_decoder(layers=LAYERS)


def batch(rank: int, length: int = 12) -> dict[str, Tensor]:
    """The batch of one rank: ragged prompts, and as many output tokens on every rank, so that means may be averaged."""
    generator = torch.Generator().manual_seed(rank)
    input_ids = torch.randint(1, 61, (2, length), generator=generator)
    labels = input_ids.clone()
    for row, prompt in enumerate((length - 5 - rank, length - 4 + rank)):
        labels[row, :prompt] = -100
    return {"input_ids": input_ids, "labels": labels}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def cases(**options: dict[str, Any]) -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], None]:
    """Register a function once for each set of the backend's options, as `<its name>_<name of the set>`."""

    def register(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        for name, chosen in options.items():
            CASES[f"{function.__name__}_{name}"] = lambda chosen=chosen: function(chosen)

    return register


def step(model: nn.Module, inputs: dict[str, Tensor], *, roles: bool = False) -> dict[str, Any]:
    """Run forward and backward; return the loss and the whole gradients, and clear them."""
    with token_roles(labels=inputs["labels"]) if roles else nullcontext():
        loss = model(**inputs)[0]
        loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            assert gradient is not None, name
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            parameter.grad = None
    return found


def outcome(model: nn.Module, sharded: nn.Module | None = None) -> dict[str, Any]:
    """Return what the backend says it did to a model: sites by name, and the counted optimizer steps."""
    session = session_for([each for each in model.parameters() if each.requires_grad], sharded=sharded)
    sites = {site.name: site for report in session.reports for site in report.sites}
    return {
        "sparsity": {name: site.sparsity for name, site in sites.items()},
        "asked": sorted(name for name, site in sites.items() if site.sparsity or site.reason),
        "changed": {each.record.name for report in session.reports for each in report.passes if each.record.changed},
        "steps": session.schedule.step,
    }


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cut_into_buckets() -> AbstractContextManager[None]:
    """Have the DDP optimizer of Dynamo cut models as small as these."""
    return patched(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096)


def op_by_op(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
    """Compile as nothing: autograd differentiates the rewritten graph, which takes seconds less than AOTAutograd."""
    return gm.forward  # type: ignore[no-any-return]


# --- DDP --------------------------------------------------------------------------------------------------------------


@cases(zero=ZERO, exact=EXACT, sparse=SPARSE)
def ddp_compiled_then_wrapped(options: dict[str, Any]) -> dict[str, Any]:
    """With the DDP optimizer on, which leaves models as small as this whole."""
    model = decoder()
    model.compile(backend="sparselora", options=options)
    return step(DistributedDataParallel(model), batch(dist.get_rank())) | outcome(model)


@cases(exact=EXACT, sparse=SPARSE)
def ddp_wrapped_then_compiled(options: dict[str, Any]) -> dict[str, Any]:
    """With the DDP optimizer off, which would cut the model otherwise."""
    model = DistributedDataParallel(decoder(), bucket_cap_mb=0.01)
    model.compile(backend="sparselora", options=options)
    with cut_into_buckets(), torch._dynamo.config.patch(optimize_ddp=False):
        return step(model, batch(dist.get_rank())) | outcome(model.module)


@case
def ddp_cut_into_buckets() -> dict[str, Any]:
    model = DistributedDataParallel(decoder(), bucket_cap_mb=0.01)
    model.compile(backend="sparselora", options=SPARSE)
    with cut_into_buckets():
        return step(model, batch(dist.get_rank())) | outcome(model.module)


@case
def one_rank_compiles_alone() -> dict[str, Any]:
    """One rank alone meets another length, compiles for it and asks for factors of its own rank."""
    rank = dist.get_rank()
    model = decoder()
    model.compile(backend="sparselora", options=SPARSE | {"predictor_rank": 4 + rank})
    wrapped = DistributedDataParallel(model)
    step(wrapped, batch(rank))
    return step(wrapped, batch(rank, length=12 + 5 * rank)) | outcome(model)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def sharded_decoder(options: dict[str, Any] | None = None, layers: int = LAYERS) -> Fp64Decoder:
    """A sharded decoder, each of whose blocks is compiled where options are given."""
    model = fp64_decoder(layers=layers)
    for layer in model.layers:
        if options is not None:
            layer.compile(backend="sparselora", options=options)
        fully_shard(layer)
    return fully_shard(model)


@cases(zero=ZERO, exact=EXACT, sparse=SPARSE)
def fsdp_blocks_compiled(options: dict[str, Any]) -> dict[str, Any]:
    """By AOTAutograd: what its graphs save for the backward are gathered parameters, freed and gathered again."""
    model = sharded_decoder(options)
    with patched(executable, "compile_with_inductor", aot_eager):
        return step(model, batch(dist.get_rank()), roles=True) | outcome(model, sharded=model)


@cases(exact=EXACT, sparse=SPARSE)
def fsdp_whole_compiled(options: dict[str, Any]) -> dict[str, Any]:
    model = sharded_decoder()
    model.compile(backend="sparselora", options=options)
    return step(model, batch(dist.get_rank()), roles=True) | outcome(model, sharded=model)


@case
def fsdp_without_roles() -> dict[str, Any]:
    model = sharded_decoder(SPARSE)
    inputs = batch(dist.get_rank())
    step(model, inputs)
    return step(model, inputs) | outcome(model, sharded=model)


@case
def fsdp_preset() -> dict[str, Any]:
    model = sharded_decoder({"preset": "o2", "start_step": 0}, layers=3)
    return step(model, batch(dist.get_rank()), roles=True) | outcome(model, sharded=model)


@case
def fsdp_schedule() -> dict[str, Any]:
    """The first step is dense, the second sparse; labels open the roles, as the trainer's callback has them do."""
    model = sharded_decoder(SPARSE | {"start_step": 1, "schedule": Schedule(total_steps=2)})
    roles = LabelRoles(model)
    # Of no effect on the weights: what is compared is the phase.
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.0)
    steps = []
    for _ in range(2):
        steps.append(step(model, batch(dist.get_rank())))
        roles.close()
        optimizer.step()
    roles.remove()
    return {"all": steps} | outcome(model, sharded=model)


@case
def fsdp_checkpointed() -> dict[str, Any]:
    """A checkpoint around each compiled block runs it again in the backward, where the roles are still open."""
    model = decoder()
    for index, layer in enumerate(model.layers):
        layer.compile(backend="sparselora", options=SPARSE)
        model.layers[index] = fully_shard(checkpoint_wrapper(layer, CheckpointImpl.NO_REENTRANT))
    fully_shard(model)
    return step(model, batch(dist.get_rank()), roles=True) | outcome(model, sharded=model)


# --- Tensor parallel --------------------------------------------------------------------------------------------------


@case
def tensor_parallel() -> dict[str, Any]:
    model = fp64_decoder(layers=1, adapters=("q_proj",))
    plan = {"layers.0.mlp.gate_proj": ColwiseParallel(), "layers.0.mlp.up_proj": ColwiseParallel()}
    plan |= {"layers.0.mlp.down_proj": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    model.compile(backend="sparselora", options={"layer_sparsity": {"layers.0.mlp": 0.5}, "start_step": 0})
    return step(model, batch(0)) | outcome(model)


def note_factorized() -> list[tuple[int, float]]:
    """Have this process note each weight that it factorises: the rank of the factors, and the sum of the weight."""
    calls: list[tuple[int, float]] = []
    factorize = factors.factorize

    def counted(weight: Tensor, rank: int, seed: int) -> factors.LowRankFactors:
        calls.append((rank, float(weight.sum())))
        return factorize(weight, rank, seed)

    factors.factorize = counted
    return calls


def main() -> None:
    torch.set_num_threads(1)
    executable.compile_with_inductor = op_by_op
    # A rank that waits for ever must not keep the test waiting.
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    calls = note_factorized()
    results: dict[str, Any] = {}
    for name, run in CASES.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        torch._dynamo.reset()
        IN_PROCESS.clear()
        notices._matched.clear()
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results[name] = run()
            except Exception as error:  # the test shows it
                results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["cpu_seconds"] = time.process_time()
        told = [str(w.message) for w in caught]
        results[name]["told"] = [text for text in told if "sparselora" in text or "layer_sparsity" in text]
    results["factorized"] = calls
    torch.save(results, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
