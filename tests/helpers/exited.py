"""Runs in which context leaves the residual stream, and the oracle of their sparse steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mapped import mapped_sites
from models import Kept, batch, fp64_decoder, masked_sites
from oracle import Step, assert_same_step, train_step
from sparse_compile import Recipe
from sparse_compile.compiler.report import GraphReport
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import ContextExit, ExitMap, masked_dense, output_mask_from_labels
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session, session_for
from sparse_compile.training.token_capacity import known_tokens
from tolerances import Tolerance

ATTENTION = ("self_attn", "attention", "attn")
READS_X = ("q_proj", "query_key_value", "c_attn", "qkv_proj")
"""What a family calls its attention, and the layer in it that reads x."""


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what is trained of a model."""
    return [each for each in model.parameters() if each.requires_grad]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a decoder of torch or Hugging Face, with PEFT or without."""
    (found,) = (
        list(each)
        for each in model.modules()
        if isinstance(each, nn.ModuleList) and any(hasattr(each[0], name) for name in ATTENTION)
    )
    return found


def attention_of(block: nn.Module) -> nn.Module:
    """Return the attention of a block."""
    return next(getattr(block, name) for name in ATTENTION if hasattr(block, name))


def context_exit(model: nn.Module, maps: Mapping[str, AffineMap], exit_: int, *, detached: bool = False) -> ContextExit:
    """Describe an exit to the oracle.

    Args:
        model: the model.
        maps: of each later block, by the name of its attention.
        exit_: the block before which context leaves.
        detached: whether no gradient passes through the maps.
    """
    blocks = blocks_of(model)
    names = {module: name for name, module in model.named_modules()}
    attention = attention_of(blocks[exit_])
    projection = next(getattr(attention, name) for name in READS_X if hasattr(attention, name))
    later = []
    for block in blocks[exit_ + 1 :]:
        (found,) = (each for name, each in maps.items() if names[attention_of(block)].endswith(name))
        later.append(ExitMap(block, found.q, found.u, found.bias))
    return ContextExit(blocks[exit_], projection, later, detached)


class ExitRun:
    """A model that trains with a context exit.

    Args:
        model: the model; without it a decoder of four blocks.
        exit_: the block before which context leaves.
        dynamic: as for `torch.compile`.
        batches: how batches are made, as keyword arguments of `batch`.
        masked: whether all batches have an attention mask, so that they share a graph.
        **options: of the backend.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        exit_: int = 2,
        dynamic: bool | None = False,
        batches: Mapping[str, Any] | None = None,
        masked: bool = False,
        **options: Any,
    ) -> None:
        self.model = fp64_decoder(layers=4) if model is None else model
        self.exit = exit_
        self.shape = {"rows": 8, **(batches or {})}
        self.masked = masked
        blocks = len(blocks_of(self.model))
        plain = {"layer_sparsity": {}, "context_exit": exit_ / blocks, "start_step": 4, "dense_every": 4}
        self.options = {**plain, "strict": True, **options}
        self.options = {name: each for name, each in self.options.items() if each is not None}
        self.call = torch.compile(self.model, backend="sparselora", dynamic=dynamic, options=self.options)
        self.optimizer = torch.optim.SGD(trained(self.model), lr=0.05)
        self.step = 0

    @property
    def session(self) -> Session:
        """Of the model."""
        return session_for(trained(self.model))

    @property
    def report(self) -> GraphReport:
        """Of the graph that was compiled last."""
        return self.session.reports[-1]

    @property
    def reasons(self) -> list[str]:
        """Why something in that graph was declined."""
        return [each.reason for each in self.report.rejections]

    def batch(self, seed: int = 99, **shape: Any) -> dict[str, Tensor]:
        """Draw a batch."""
        config = self.model.config  # type: ignore[attr-defined]
        vocab = getattr(config, "vocab_size", None) or config.vocab
        found = batch(vocab, seed=seed, **{**self.shape, **shape})
        return {"attention_mask": torch.ones_like(found["input_ids"]), **found} if self.masked else found

    def train(self, steps: int, **shape: Any) -> list[str]:
        """Take some steps; return the phase of each."""
        phases = []
        for _ in range(steps):
            inputs = self.batch(self.step, **shape)
            with self._counted(inputs):
                outputs = self.call(**inputs)
            (outputs[0] if isinstance(outputs, tuple) else outputs.loss).backward()
            phases.append(self.session.phase)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return phases

    def _counted(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Count output tokens where that is wanted, as the callback does."""
        return known_tokens(inputs["labels"]) if "token_bucket" in self.options else nullcontext()

    @property
    def maps(self) -> dict[str, AffineMap]:
        """The maps as they are now, by site name."""
        return {name.partition("@")[0]: each.surrogate for name, each in self.session.online_maps.items()}

    def oracle(
        self,
        inputs: dict[str, Tensor],
        *,
        maps: Mapping[str, AffineMap] | None = None,
        kept: Kept | None = None,
        seed: int | None = None,
        detached: bool | None = None,
    ) -> Step:
        """Return the step of the eager model with the exit, and with the FFN maps and channels of sites below it."""
        maps = self.maps if maps is None else maps
        of_blocks = {name: each for name, each in maps.items() if name.endswith(ATTENTION)}
        detached = self.options.get("surrogate_gradient") == "detached" if detached is None else detached
        below = Recipe({name: SiteRecipe(each) for name, each in maps.items() if name not in of_blocks})
        sites = [
            context_exit(self.model, of_blocks, self.exit, detached=detached),
            *mapped_sites(self.model, below, detached=detached),
            *masked_sites(self.model, kept or {}),
        ]
        with masked_dense(sites, output_mask_from_labels(inputs["labels"])):
            return train_step(self.model, self.model, inputs, seed)

    def sparse(
        self, inputs: dict[str, Tensor], seed: int | None = None, call: Callable[..., Any] | None = None
    ) -> Step:
        """Run a step, which is to be a sparse one."""
        with self._counted(inputs):
            step = train_step(self.model, call or self.call, inputs, seed)
        assert self.session.phase != DENSE
        return step

    def check(
        self,
        inputs: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        *,
        tolerance: Tolerance | None = None,
        seed: int | None = None,
        kept: Kept | None = None,
        what: str = "",
    ) -> None:
        """Assert that a sparse step is that of the oracle, and that the exit and its maps do something."""
        inputs = self.batch() if inputs is None else inputs
        expected = self.oracle(inputs, seed=seed, kept=kept)
        assert_same_step(self.sparse(inputs, seed), expected, dtype, tolerance=tolerance, what=what)
        if not self.maps:
            return  # the block of the exit reads context as it is: no later block is there to see anything else
        zeros = {name: AffineMap(*(0 * part for part in (a.q, a.u, a.bias))) for name, a in self.maps.items()}
        others = {
            "dense": train_step(self.model, self.model, inputs, seed),
            "without maps": self.oracle(inputs, maps=zeros, seed=seed, kept=kept),
        }
        for name, other in others.items():
            assert (other.loss - expected.loss).abs() > 1e-6, f"{what}: the loss is that of a step {name}"
