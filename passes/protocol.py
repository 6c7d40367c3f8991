"""The protocol of a pass and the context it works in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from torch import fx

from sparse_compile.graph.facts import (
    Rejection,
)

if TYPE_CHECKING:
    pass


from sparse_compile.passes.context import PassContext


class Numerics(Enum):
    """What a pass may do to the result: nothing beyond rounding, approximate it, or what an option asks for.

    A requested function is the user's model from then on: in the dense phase and in evaluation as well.
    """

    EXACT = "exact"
    APPROXIMATE = "approximate"
    REQUESTED = "requested"


@dataclass(frozen=True)
class PassOutcome:
    """What a pass did.

    Attributes:
        changed: whether the graph was rewritten.
        stats: counts for the manifest.
        rejections: the places where the pass looked and did not apply.
    """

    changed: bool
    stats: Mapping[str, int] = field(default_factory=dict)
    rejections: tuple[Rejection, ...] = ()


class InvalidOptionError(ValueError):
    """An option that the user has to mend: the pipeline lets it through, and goes on without any other failed pass."""


class RequestedFunctionError(RuntimeError):
    """The function that an option asks for cannot be made of a graph.

    Unlike an optimisation it cannot be left out: the graph would go on to train another function than was asked for.
    """


class Pass(Protocol):
    """One step of the pipeline: a frozen dataclass with these attributes and `run`.

    `requires` and `ensures` are stages of the graph and its facts (`verify.STAGES`). An analysis assigns facts in the
    context and leaves the graph alone; a transform rewrites the graph it is given, which is a copy that the pipeline
    swaps in when the pass and the verifier agree. Not matching is data: `PassOutcome.rejections`.
    """

    @property
    def name(self) -> str:
        """Name in the table of passes, in `disable=` and in dumps."""
        ...

    @property
    def requires(self) -> tuple[str, ...]:
        """Stages that must have been reached."""
        ...

    @property
    def ensures(self) -> tuple[str, ...]:
        """Stages reached afterwards."""
        ...

    @property
    def numerics(self) -> Numerics:
        """What the pass may do to the result."""
        ...

    @property
    def analysis(self) -> bool:
        """Whether the pass only finds facts."""
        ...

    @property
    def optimises(self) -> bool:
        """Whether the pass is exact and there for speed alone: preset `none` leaves it out."""
        ...

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Run the pass."""
        ...
