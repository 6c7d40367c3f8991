"""Which changes outside a graph have Dynamo compile it anew."""

from __future__ import annotations

from torch import fx

from sparse_compile.compiler.mask_watch import guard_masks
from sparse_compile.compiler.notices import asks_for_sparsity
from sparse_compile.passes.context import PassContext
from sparse_compile.torch_private.dynamo import install_identity_guards, install_value_guard
from sparse_compile.training.session import Session
from sparse_compile.training.token_capacity import watch


def install_guards(gm: fx.GraphModule, ctx: PassContext, session: Session, *, path: str, sparse: bool) -> None:
    """Guard a training graph on what it was compiled for, beside what Dynamo guards on its own.

    Args:
        gm: the captured graph.
        ctx: its facts.
        session: of its model.
        path: where in its model the graph stands; empty for a whole model.
        sparse: whether it has sparse sites.
    """
    config, facts = ctx.env.config, ctx.facts
    install_value_guard("sparse_compile.training.roles", "ROLES_GIVEN")
    if config.token_bucket is not None and facts.roles is not None:
        shift = 1 if facts.roles.origin == "given" else facts.roles.labels[0][1]
        install_value_guard("sparse_compile.training.token_capacity", "CAPACITIES", watch(config.token_bucket, shift))
    if sparse and facts.slots is not None:
        install_value_guard("sparse_compile.training.phase", "PHASES", session.id)
    if sparse or (path and facts.roles is not None and asks_for_sparsity(config)):
        # Blocks are alike: what is planned for one, dense or sparse, goes for no other.
        install_identity_guards(_inputs_of_this_model(gm, ctx))
    if "preserve_weight_mask" in config.requested:
        guard_masks(gm, ctx, session)


def _inputs_of_this_model(gm: fx.GraphModule, ctx: PassContext) -> list[fx.Node]:
    """Return the inputs that tie a graph to its model: weights that were factorised, and what the session trains."""
    projections = [projection for plan in ctx.facts.plan.split_sites for projection in plan.site.projections]
    weights = {name for projection in projections for name in ctx.weight_inputs(projection)}
    trained = next(name for name, parameter in ctx.env.parameters.items() if parameter.trained)
    return [node for node in gm.graph.nodes if node.op == "placeholder" and node.name in weights | {trained}]
