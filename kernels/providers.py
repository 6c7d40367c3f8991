"""Choose, for each semantic op, the implementation that runs it.

An op's schema, fake and autograd formula are written once (`<op>/op.py`); what computes it is a *provider*. Each call
carries the provider's name as an argument, so the choice that `lower_sparse_ops` makes per node is visible in every
dump, survives the autograd formula (the backward op is called with the same name) and is part of every compile cache
key. `reference` is the plain PyTorch body: it is the specification, always supported, and the fallback.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

REFERENCE = "reference"


_NOT_MEASURED = (
    "nothing shows yet that it is faster: no such device has measured it; the option kernels='triton' asks for it"
)


@dataclass(frozen=True)
class OpCall:
    """What a provider may look at to decide whether it supports a call.

    Attributes:
        device: device type, such as `"cpu"`.
        dtype: dtype of the activations.
        columns: width of the result, where it is known and a provider may care.
        rank: largest rank of the predictor's factors, where there are any.
    """

    device: str
    dtype: torch.dtype
    columns: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Provider:
    """One implementation of one semantic op.

    Attributes:
        name: the value of the op's `provider` argument.
        run: same signature as the reference body.
        declines: returns the reason why a call is not supported, or None where it is.
    """

    name: str
    run: Callable[..., object]
    declines: Callable[[OpCall], str | None]


@dataclass(frozen=True)
class Choice:
    """The provider chosen for a call, and why each better one was passed over."""

    provider: str
    declined: tuple[tuple[str, str], ...]


class ProviderTable:
    """The providers of one op, best first; the reference body comes last.

    Args:
        op: name of the op.
        reference: its plain PyTorch body.
        *others: the providers that are preferred to it.
        candidates: providers that run by their name alone: proven, and not yet measured to be faster.
    """

    def __init__(
        self,
        op: str,
        reference: Callable[..., object],
        *others: Provider,
        candidates: tuple[Provider, ...] = (),
    ) -> None:
        self.op = op
        self._candidates = candidates
        self._providers = (*others, Provider(REFERENCE, reference, lambda call: None))
        self._run = {provider.name: provider.run for provider in (*self._providers, *candidates)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the providers."""
        return tuple(self._run)

    def __getitem__(self, name: str) -> Callable[..., object]:
        """Return the implementation called `name`; raise `ValueError` for an unknown one."""
        if name not in self._run:
            raise ValueError(f"sparselora::{self.op} has no provider {name!r}; it has {', '.join(self._run)}")
        return self._run[name]

    def choose(self, call: OpCall, kernels: str = "measured") -> Choice:
        """Return the first provider that supports `call`.

        Args:
            call: what is to be computed.
            kernels: `"measured"` leaves candidates out; `"triton"` asks for them first.
        """
        declined: list[tuple[str, str]] = []
        wanted = self._candidates if kernels == "triton" else ()
        for provider in (*wanted, *self._providers):
            reason = provider.declines(call)
            if provider.name == REFERENCE and not wanted:
                declined += [(each.name, _NOT_MEASURED) for each in self._candidates if each.declines(call) is None]
            if reason is None:
                return Choice(provider.name, tuple(declined))
            declined.append((provider.name, reason))
        raise AssertionError("the reference provider declines nothing")


def cpu_only(call: OpCall) -> str | None:
    """Decline every device but the CPU."""
    return None if call.device == "cpu" else f"runs on cpu, not on {call.device}"


def triton_runs(call: OpCall) -> str | None:
    """Decline what the Triton kernels do not compute: devices other than NVIDIA's, old ones, fp64.

    Triton's interpreter (`TRITON_INTERPRET=1`) runs them on any device.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not interpreted and (call.device != "cuda" or torch.version.hip is not None):
        return f"runs on NVIDIA GPUs, not on {call.device if torch.version.hip is None else 'ROCm'}"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"computes fp32, fp16 and bf16, not {call.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted:
        return None
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0, this device has {major}.{minor}"
