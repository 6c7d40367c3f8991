"""The ordered list of passes.

Data flows one way: captured graph -> one flat graph -> canonical linears -> sites -> roles -> plan -> exact
optimisations -> predictors -> sparse products -> providers. Each pass declares what must stand before it; an order that
breaks a declaration is an error at import.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sparse_compile.compiler.legal import STAGES
from sparse_compile.options.pass_names import pass_names
from sparse_compile.passes.canonical.canonicalize_linears import CanonicalizeLinears
from sparse_compile.passes.canonical.expose_4bit_weights import Expose4BitWeights
from sparse_compile.passes.canonical.inline_checkpoint_bodies import InlineCheckpointBodies
from sparse_compile.passes.exact.factor_dora_norm import FactorDoRANorm
from sparse_compile.passes.exact.fuse_adapters import FuseAdapters
from sparse_compile.passes.exact.order_adapter_products import OrderAdapterProducts
from sparse_compile.passes.exact.select_loss_rows import SelectLossRows
from sparse_compile.passes.lower.fuse_adapted_layers import FuseAdaptedLayers
from sparse_compile.passes.lower.fuse_products import FuseProducts
from sparse_compile.passes.lower.fuse_scores import FuseScores
from sparse_compile.passes.lower.lower_causal_attention import LowerCausalAttention
from sparse_compile.passes.lower.lower_frozen_linears import LowerFrozenLinears
from sparse_compile.passes.lower.lower_sparse_ops import LowerSparseOps
from sparse_compile.passes.protocol import Numerics, Pass
from sparse_compile.passes.requested.preserve_weight_mask import PreserveWeightMask
from sparse_compile.passes.roles.plan_sparsity import PlanSparsity
from sparse_compile.passes.roles.plan_token_slots import PlanTokenSlots
from sparse_compile.passes.roles.trace_roles import TraceRoles
from sparse_compile.passes.sites.find_attention import FindAttention
from sparse_compile.passes.sites.find_ffn import FindFFN
from sparse_compile.passes.sites.find_projections import FindProjections
from sparse_compile.passes.sparse.exit_context import ExitContext
from sparse_compile.passes.sparse.insert_predictors import InsertPredictors
from sparse_compile.passes.sparse.sparsify_attention import SparsifyAttention
from sparse_compile.passes.sparse.sparsify_ffn import SparsifyFFN

__all__ = ["ANALYSIS_PASSES", "EVALUATION_PASSES", "PASSES", "in_order"]


def in_order(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Return passes in the order given.

    Raises:
        ValueError: a pass requires a stage that none before it ensures, stands before a pass that it is to follow, or
            declares something that does not exist.
    """
    order = tuple(passes)
    positions = {each.name: position for position, each in enumerate(order)}
    if len(positions) < len(order):
        raise ValueError("a pass stands twice in the order")
    reached = {"captured"}
    for position, each in enumerate(order):
        if unknown := {*each.requires, *each.ensures} - set(STAGES):
            raise ValueError(f"{each.name} names the stage {', '.join(sorted(unknown))}, which does not exist")
        if unknown := set(each.after) - pass_names():
            raise ValueError(f"{each.name} is to follow {', '.join(sorted(unknown))}, which does not exist")
        if missing := [stage for stage in each.requires if stage not in reached]:
            raise ValueError(f"{each.name} requires {', '.join(missing)}, which no pass before it ensures")
        if late := [name for name in each.after if positions.get(name, -1) > position]:
            raise ValueError(f"{each.name} stands before {', '.join(late)}, which it is to follow")
        reached |= set(each.ensures)
    return order


PASSES: Final = in_order((
    InlineCheckpointBodies(),
    Expose4BitWeights(),
    CanonicalizeLinears(),
    FindProjections(),
    FindFFN(),
    FindAttention(),
    TraceRoles(),
    PlanTokenSlots(),
    PlanSparsity(),
    SelectLossRows(),
    PreserveWeightMask(),
    OrderAdapterProducts(),
    FuseAdapters(),
    FactorDoRANorm(),
    InsertPredictors(),
    ExitContext(),
    SparsifyFFN(),
    SparsifyAttention(),
    FuseProducts(),
    FuseScores(),
    FuseAdaptedLayers(),
    LowerSparseOps(),
    LowerFrozenLinears(),
    LowerCausalAttention(),
))  # fmt: skip
"""All passes, in the order in which they run."""

if forgotten := pass_names() ^ {each.name for each in PASSES}:
    raise ImportError(
        f"every module in a chapter of passes is one pass of this list, but {', '.join(sorted(forgotten))}"
    )

ANALYSIS_PASSES: Final = in_order(PASSES[: 1 + next(at for at, each in enumerate(PASSES) if "roles" in each.ensures)])
"""The passes that find sites and roles, and decide nothing."""

EVALUATION_PASSES: Final = in_order(
    each
    for each in PASSES
    if each.name in ("expose_4bit_weights", "canonicalize_linears", "find_projections")
    or each.numerics is Numerics.REQUESTED
)
"""The passes of a graph without gradients: what changes the function itself, by request, and what that needs."""
