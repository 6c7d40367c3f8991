"""Read the maps that a run has fitted, as a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from sparse_compile.calibration.origin import versions
from sparse_compile.options.recipe import AffineMap, ExitRecipe, Recipe, SiteRecipe
from sparse_compile.surrogates.online import OnlineMap
from sparse_compile.training.session import Session, known_sessions

__all__ = ["recipe_of"]


def recipe_of(model: nn.Module) -> Recipe:
    """Return the maps that a run has fitted so far, as a recipe that another run can start from.

    The maps are copies: what the run fits later changes no recipe. They imitate the blocks with their adapters as they
    are now.

    Args:
        model: A model that trains under preset ``"auto"``, with a ``context_exit``, or with a recipe and
            ``dense_every``.

    Returns:
        A recipe with the maps of its feed-forward blocks, of the blocks behind the exit where context leaves, and with
        the schedule of the run.

    Raises:
        ValueError: The model fits no maps, or none is fitted yet.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sessions = known_sessions(trained)
    found = {name: each for session in sessions for name, each in session.online_maps.items()}
    if not found:
        raise ValueError(
            "no run of this model fits maps: compile it with preset='auto' and take a training step, or use calibrate()"
        )
    if waiting := [name for name, each in found.items() if not each.fitted]:
        raise ValueError(f"{len(waiting)} of {len(found)} maps are not fitted yet: the run needs more dense steps")
    exits = {each.left_at for each in found.values() if each.left_at}
    behind = {_site(name): _recipe(each) for name, each in found.items() if each.left_at}
    return Recipe(
        {_site(name): _recipe(each) for name, each in found.items() if not each.left_at},
        {
            "made_by": "a run",
            "tokens": round(min(each.tokens for each in found.values())),
            **versions(),
        },
        None,
        ExitRecipe(exits.pop(), behind) if exits else None,
        *_schedule(sessions),
    )


def _schedule(sessions: Sequence[Session]) -> tuple[int | None, float | int | None]:
    """Return of how many steps one is dense in a run, and the first dense step at its end."""
    config = next(session.config for session in sessions if session.online_maps)
    assert config is not None, "a run that fits maps was compiled"
    return config.dense_period, config.dense_from


def _site(identity: str) -> str:
    """Return the name of a site without what tells it from others of that name."""
    return identity.partition("@")[0]


def _recipe(online: OnlineMap) -> SiteRecipe:
    parts = (part.detach().cpu().clone() for part in (online.surrogate.q, online.surrogate.u, online.surrogate.bias))
    error = None if math.isnan(online.error) else online.error
    return SiteRecipe(AffineMap(*parts), weights=online.weights(), error=error)
