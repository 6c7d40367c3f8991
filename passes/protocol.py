"""The protocol of a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from torch import fx

from sparse_compile.graph.facts import Rejection
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
        changed: whether the graph was rewritten. Where it was not, the next pass is given the same copy.
        stats: counts for the manifest.
        rejections: the places where the pass looked and did not apply.
    """

    changed: bool
    stats: Mapping[str, int] = field(default_factory=dict)
    rejections: tuple[Rejection, ...] = ()


class InvalidOptionError(ValueError):
    """An option that the user has to mend: the runner lets it through, and goes on without any other failed pass."""


class RequestedFunctionError(RuntimeError):
    """The function that an option asks for cannot be made of a graph.

    Unlike an optimisation it cannot be left out: the graph would go on to train another function than was asked for.
    """


class Pass(ABC):
    """One step of the pipeline: a class without state in a module of its own, in the chapter that it belongs to.

    An analysis records facts in the context and leaves the graph alone. A transform rewrites the graph it is given,
    which is a copy that the runner swaps in when the pass and the verifier agree. Where either fails, graph and facts
    are what they were. Not matching is data: `PassOutcome.rejections`.

    A pass declares below what differs from the defaults; the order of the passes must agree with it
    (`pipeline.in_order`).

    Attributes:
        name: name in `disable=`, in reports and in dumps: that of the module.
        requires: stages (`legal.STAGES`) that must have been reached.
        ensures: stages that are reached afterwards.
        after: passes that stand before this one, where they run at all, for reasons that no stage expresses.
        numerics: what the pass may do to the result.
        analysis: whether the pass only finds facts.
        optimises: whether the pass is exact and there for speed alone: preset `none` leaves it out.
        sparsifies: the kind of site that the pass makes sparse, empty for any other pass.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ("captured",)
    ensures: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    numerics: ClassVar[Numerics] = Numerics.EXACT
    analysis: ClassVar[bool] = False
    optimises: ClassVar[bool] = False
    sparsifies: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = vars(cls).get("name") or cls.__module__.rpartition(".")[2]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Run the pass."""
