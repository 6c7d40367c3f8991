"""Fixtures and settings of the whole suite: offline, deterministic, with caches of its own."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SUITE_CACHE = pytest.StashKey[Path]()


@dataclass
class EagerCompiler:
    """Stands in for Inductor and keeps account.

    Attributes:
        ahead_of_time: whether AOTAutograd and the partitioner come first, as with Inductor.
        graphs: every graph that it compiled, in order.
        runs: for each of them, how often it ran forward.
    """

    ahead_of_time: bool
    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
        from graphs import aot_eager, graph_eager

        compiled = (aot_eager if self.ahead_of_time else graph_eager)(gm, example_inputs)
        number = len(self.graphs)
        self.graphs.append(gm)
        self.runs.append(0)

        def run(*args: Any) -> Any:
            self.runs[number] += 1
            return compiled(*args)

        return run

    @property
    def sparse(self) -> list[bool]:
        """For each graph, whether the passes made it sparse."""
        splits = ("split_tokens", "token_slots")
        return [any(split in str(node.target) for node in gm.graph.nodes for split in splits) for gm in self.graphs]


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment that this process, the xdist workers and the programs that tests start all share."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What each node is recorded to hold is checked after every pass, in every test.
    os.environ.setdefault("SPARSELORA_VERIFY", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers are the parallelism: more threads, or pools of compile processes, would only fight over the cores.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        torch.set_num_threads(1)
    else:
        # One compile cache for a run of the suite, never one from an earlier run: tests reuse each other's kernels,
        # and no result can come from code that is gone. Workers inherit it.
        cache = Path(tempfile.mkdtemp(prefix="sparse_compile_tests_"))
        config.stash[SUITE_CACHE] = cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the compile cache of this run, and let the interpreter take down what was frozen."""
    gc.unfreeze()
    cache = config.stash.get(SUITE_CACHE, None)
    if cache is not None:
        shutil.rmtree(cache, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the imports left, and most of its rounds: tracing allocates a great deal."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test the same seeds, an empty predictor cache, and a backend and a Dynamo without memory of others."""
    if told := sys.modules.get("sparse_compile.training.told"):
        told.IN_PROCESS.clear()
    if schedule := sys.modules.get("sparse_compile.training.schedule"):
        # Most tests train a few steps of a loop whose length nobody knows: `default_start` brings the dense steps back.
        monkeypatch.setattr(schedule, "DEFAULT_START_STEPS", 0)
    if notices := sys.modules.get("sparse_compile.compiler.notices"):
        notices._matched.clear()
    monkeypatch.setenv("SPARSELORA_CACHE_DIR", str(tmp_path / "sparselora_cache"))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)
    yield
    # Importing Dynamo takes seconds, so a test that did not compile does not pay for it.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def default_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run of unknown length start densely, as it does for users."""
    from sparse_compile.options.presets import DEFAULT_START_STEPS

    monkeypatch.setattr("sparse_compile.training.schedule.DEFAULT_START_STEPS", DEFAULT_START_STEPS)


@pytest.fixture
def maps_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have maps pay for the split of their tokens: blocks as narrow as a test's do not."""
    from sparse_compile.graph.cost import Gain

    monkeypatch.setattr("sparse_compile.passes.roles.plan_sparsity.map_gain", lambda *_: Gain(1.0, 0.0))


@pytest.fixture
def aot_eager_inductor(monkeypatch: pytest.MonkeyPatch) -> EagerCompiler:
    """Have the backend compile by AOTAutograd and the min-cut partitioner, but run the graphs op by op.

    Data-dependent sizes, autograd formulas and the partitioner are exercised in a second, where Inductor takes many.
    """
    compiler = EagerCompiler(ahead_of_time=True)
    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compiler)
    return compiler


@pytest.fixture
def eager_inductor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EagerCompiler:
    """Have the backend run its graphs op by op under plain autograd, for a fifth of the time of AOTAutograd.

    For what the backend decides and what its graphs compute. A module that uses it has tests through AOTAutograd too:
    where a test asks for `aot_eager_inductor` as well, that is what it gets.
    """
    if "aot_eager_inductor" in request.fixturenames:
        through_aot: EagerCompiler = request.getfixturevalue("aot_eager_inductor")
        return through_aot
    compiler = EagerCompiler(ahead_of_time=False)
    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", compiler)
    return compiler


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the root folder of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of real data and models, or skip where it is absent.

    It is `$SPARSE_COMPILE_SHARED`, or else `shared` beside the source tree.
    """
    folder = Path(os.environ.get("SPARSE_COMPILE_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no folder of real data and models at {folder}; set SPARSE_COMPILE_SHARED to have this test run")
    return folder
