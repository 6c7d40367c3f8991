"""Two processes train together: DDP and FSDP2, against single processes that train alone.

The batches of both ranks have as many output tokens, so that the mean of their gradients is the gradient of their
concatenation. A sparse rank chooses channels for its own batch: there the reference is the mean of two runs alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from distributed_worker import RANKS, SPARSE, batch, decoder, op_by_op, step
from sparse_compile.compiler import executable
from tolerances import assert_close_rms

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PATH = os.pathsep.join(str(HELPERS.parent / name) for name in ("helpers", "support"))
WRAPPED = ("ddp_compiled_then_wrapped", "ddp_wrapped_then_compiled", "fsdp_blocks_compiled", "fsdp_whole_compiled")

Result = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What each rank's `distributed_worker.py` returned, by case."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = os.environ | {
        "PYTHONPATH": PATH,
        "SPARSELORA_CACHE_DIR": str(out / "factors"),
        "OMP_NUM_THREADS": "1",
    }
    # In an empty folder: `-m` puts the working folder on the path, where `kernels/` would be taken for a package.
    run = subprocess.run(
        [*command, str(HELPERS / "distributed_worker.py"), str(out)],
        cwd=out, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Result]]:
    """Runs the sparse step of one rank in this process, alone, once for each rank."""
    found: dict[int, Result] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executable, "compile_with_inductor", op_by_op)
        model = decoder()
        model.compile(backend="sparselora", options=SPARSE)

        def run(rank: int) -> Result:
            if rank not in found:
                found[rank] = step(model, batch(rank))
            return found[rank]

        yield run


def of(ranks: list[Result], case: str) -> list[Result]:
    """Return what each rank made of a case, once none of them failed."""
    results = [rank[case] for rank in ranks]
    for result in results:
        assert "error" not in result, result["error"]
    return results


def assert_mean_gradients(actual: Result, expected: list[Result], what: str) -> None:
    for name in expected[0]["gradients"]:
        mean = sum(each["gradients"][name] for each in expected) / len(expected)
        assert mean.any(), name
        assert_close_rms(actual["gradients"][name], mean, name=f"{what} d {name}")


def dense_alone(*batches: dict[str, torch.Tensor]) -> Result:
    """Run the eager step on the concatenated batches."""
    return step(decoder(), {key: torch.cat([each[key] for each in batches]) for key in batches[0]})


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["ddp_compiled_then_wrapped_zero", "fsdp_blocks_compiled_zero", *(f"{each}_exact" for each in WRAPPED)]
)
def test_two_ranks_train_as_one_process_does_on_both_batches(ranks: list[Result], case: str) -> None:
    results = of(ranks, case)
    expected = dense_alone(batch(0), batch(1))
    mean_loss = sum(result["loss"] for result in results) / RANKS
    assert_close_rms(mean_loss, expected["loss"], name="loss")
    for result in results:
        assert_mean_gradients(result, [expected], case)
        optimised = result["changed"] & {"select_loss_rows", "order_adapter_products", "fuse_adapters"}
        assert bool(optimised) == case.endswith("exact")


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_sparse_ranks_train_as_the_mean_of_two_processes_alone(
    ranks: list[Result], wrapped: str, alone: Callable[[int], Result]
) -> None:
    for rank, result in enumerate(of(ranks, f"{wrapped}_sparse")):
        assert_close_rms(result["loss"], alone(rank)["loss"], name="loss")
        assert_mean_gradients(result, [alone(0), alone(1)], wrapped)
        assert {name: sparsity for name, sparsity in result["sparsity"].items() if sparsity} == SPARSE["layer_sparsity"]
        assert result["told"] == []


# --- What the user is told, and what to do about it -------------------------------------------------------------------


@pytest.mark.slow
def test_the_ddp_optimizer_leaves_a_model_dense_and_one_warning_says_what_to_set(ranks: list[Result]) -> None:
    for result in of(ranks, "ddp_cut_into_buckets"):
        assert_mean_gradients(result, [dense_alone(batch(0), batch(1))], "cut")
        (told,) = result["told"]
        assert "torch._dynamo.config.optimize_ddp = False" in told


@pytest.mark.slow
def test_blocks_without_roles_are_dense_and_one_warning_names_token_roles(ranks: list[Result]) -> None:
    for result in of(ranks, "fsdp_without_roles"):
        assert_mean_gradients(result, [dense_alone(batch(0), batch(1))], "no roles")
        (told,) = result["told"]
        assert "token_roles(labels=" in told


@pytest.mark.slow
def test_tensor_parallel_is_dense_and_said_so(ranks: list[Result]) -> None:
    for result in of(ranks, "tensor_parallel"):
        (told,) = result["told"]
        assert "tensor parallel" in told


def test_the_trainers_callback_keeps_graphs_whole_while_a_run_lasts() -> None:
    from transformers import TrainerState

    from sparse_compile import SparseLoRACallback

    model, callback, config = decoder(), SparseLoRACallback(), torch._dynamo.config
    run: Any = (None, TrainerState(), None)
    callback.on_train_begin(*run, model=model)
    assert config.optimize_ddp, "another backend's choice"
    model.compile(backend="sparselora")
    callback.on_train_begin(*run, model=model)
    assert not config.optimize_ddp
    callback.on_train_end(*run)
    assert config.optimize_ddp
    with config.patch(optimize_ddp="python_reducer"):
        callback.on_train_begin(*run, model=model)
        assert config.optimize_ddp == "python_reducer"
        callback.on_train_end(*run)


# --- Blocks on their own ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preset_knows_the_depth_of_a_block_compiled_alone(ranks: list[Result]) -> None:
    """o2: feed-forward from 9% to 97% of the depth, attention from 43%; the first and the last block stay dense."""
    for result in of(ranks, "fsdp_preset"):
        assert result["asked"] == ["layers.1.mlp"]


@pytest.mark.slow
def test_steps_of_an_optimizer_of_shards_move_the_schedule(ranks: list[Result], alone: Callable[[int], Result]) -> None:
    for rank, result in enumerate(of(ranks, "fsdp_schedule")):
        assert result["steps"] == 2
        first, second = result["all"]
        assert_close_rms(first["loss"], dense_alone(batch(rank))["loss"], name="dense loss")
        assert_close_rms(second["loss"], alone(rank)["loss"], name="sparse loss")


@pytest.mark.slow
def test_checkpoints_around_compiled_blocks(ranks: list[Result], alone: Callable[[int], Result]) -> None:
    for result in of(ranks, "fsdp_checkpointed"):
        assert_mean_gradients(result, [alone(0), alone(1)], "checkpointed")


# --- Factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_computes_each_factor_once(ranks: list[Result]) -> None:
    """A feed-forward site of two in-projections and an attention site of three, with factors of three ranks."""
    computed = [weight for rank in ranks for weight in rank["factorized"]]
    assert len(computed) == len(set(computed)) == 3 * (2 + 3)


@pytest.mark.slow
def test_one_rank_may_compile_alone(ranks: list[Result]) -> None:
    for result in of(ranks, "one_rank_compiles_alone"):
        assert any(result["sparsity"].values())
        assert result["told"] == []


# --- Launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_under_accelerate_launch_is_sparse_on_every_rank(tmp_path: Path) -> None:
    """As `docs/distributed.md` says: `--multi_gpu` starts the processes, `use_cpu=True` has them meet through gloo."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={RANKS}"]
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = os.environ | {
        "PYTHONPATH": PATH,
        "SPARSELORA_CACHE_DIR": str(tmp_path / "factors"),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [*command, *options, str(HELPERS / "accelerate_worker.py"), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS))
    assert first["ranks"] == second["ranks"] == RANKS and first["told"] == second["told"] == []
    for rank in (first, second):
        assert rank["chosen"] and all(len(choices) == 2 for choices in rank["chosen"].values())
    # Each rank has its own batch, and so its own channels; what they train is the same.
    assert any(
        not torch.equal(ours, theirs)
        for site, choices in first["chosen"].items()
        for ours, theirs in zip(choices, second["chosen"][site], strict=True)
    )
    assert first["trained"].keys() == second["trained"].keys() != set()
    assert all(torch.equal(each, second["trained"][name]) for name, each in first["trained"].items())
