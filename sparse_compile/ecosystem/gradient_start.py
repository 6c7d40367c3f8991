"""Start LoRA adapters where the loss is steepest (LoRS, arXiv 2501.08582, section on initialisation)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.compiler.peft_support import lora_layers
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.torch_private.modules import uncompiled

_OVERSAMPLING = 10
"""Vectors beyond the rank that a randomised SVD follows (Halko et al., arXiv 0909.4061, section 4.2)."""

_POWER_ITERATIONS = 1
"""Each sharpens the subspace for two more passes over the batches."""


def gradient_guided_start(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, seed: int = 0) -> None:
    """Set the active LoRA adapters of a PEFT model to the directions in which the loss falls most, B to zero.

    With G the gradient of the loss by a layer's frozen weight, (out, in), summed over the batches at the model without
    its adapters, `lora_A` (r, in) becomes the r right singular vectors of G with the largest singular values, and
    `lora_B` (out, r) zero: the model still computes what it did without adapters, and the first step moves it by the
    part of G that rank r holds best. (The paper calls lora_A "B" and lora_B "A".) No mask is applied to G.

    G itself is never formed. A randomised SVD needs its products with thin matrices alone, which are summed up while
    the backward passes a layer: r + 10 vectors a layer are held, for four passes over the batches.

    Args:
        model: a model from `peft.get_peft_model`, compiled or not. Weights, `requires_grad`, `grad` and the modes of
            modules stay as they are; the passes run in evaluation mode, so that no dropout differs between them.
        batches: what `model(**batch)` takes, on its device. It returns the loss, or an output with a `loss`.
        seed: of the randomised SVD.

    Raises:
        ValueError: there is no batch, no linear layer with a LoRA adapter, an adapter that cannot be started so, a loss
            that is not finite, or a layer that no gradient reaches. The adapters are as they were then.
    """
    given = list(batches)
    if not given:
        raise ValueError("gradient_guided_start needs at least one batch")
    model = getattr(model, "_orig_mod", model)
    layers = _adapters(model)
    with _at_the_start(model, layers), uncompiled(model):
        vectors = _right_singular_vectors(model, layers, given, seed)
    with torch.no_grad():
        for name, (_, a, b) in layers.items():
            a.copy_(vectors[name].t())
            b.zero_()


_Layers = Mapping[str, tuple[nn.Module, nn.Parameter, nn.Parameter]]
"""By name, a layer with its adapter, A (r, in) and B (out, r)."""


def _adapters(model: nn.Module) -> _Layers:
    layers = {}
    for name, module in lora_layers(model).items():
        active = [each for each in module.active_adapters if each in module.lora_A]
        if not active or module.lora_A[active[0]].weight.dim() != 2:
            continue  # of an embedding or a convolution, which is left as it is
        reason = _reason(module, active)
        if reason:
            raise ValueError(f"{name} cannot be started from its gradient: {reason}")
        layers[name] = (module, module.lora_A[active[0]].weight, module.lora_B[active[0]].weight)
    if not layers:
        raise ValueError(
            "gradient_guided_start takes a model from peft.get_peft_model with LoRA adapters on linear layers; "
            "this has none"
        )
    return layers


def _reason(layer: Any, active: Sequence[str]) -> str:
    if len(active) > 1:
        return f"it has several active adapters ({', '.join(active)}), which would all start alike"
    (name,) = active
    rank, inputs = layer.lora_A[name].weight.shape
    outputs = layer.lora_B[name].weight.shape[0]
    if layer.merged:
        return "its adapter is merged"
    if layer.use_dora.get(name):
        return "its adapter is weight-decomposed (DoRA)"
    if rank > min(inputs, outputs):
        return f"a gradient of {outputs} x {inputs} has no {rank} singular vectors"
    return ""


@contextmanager
def _at_the_start(model: nn.Module, layers: _Layers) -> Iterator[None]:
    """Let a model compute what it does without its adapters, with gradients behind each of its adapted layers."""
    modes = {module: module.training for module in model.modules()}
    before = [(b, b.detach().clone(), b.requires_grad) for _, _, b in layers.values()]
    model.eval()
    try:
        with torch.no_grad():
            for b, _, _ in before:
                b.zero_()
                b.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for b, value, trained in before:
                b.copy_(value)
                b.requires_grad_(trained)


def _right_singular_vectors(
    model: nn.Module, layers: _Layers, batches: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Tensor]:
    """Return for each layer (in, r): the right singular vectors of its gradient, by falling singular value."""
    generator = torch.Generator().manual_seed(seed)
    thin: dict[str, Tensor] = {}
    for name, (_, a, b) in layers.items():
        width = min(a.shape[0] + _OVERSAMPLING, a.shape[1], b.shape[0])
        thin[name] = torch.randn(b.shape[0], width, generator=generator).to(b.device, at_least_fp32(a, b))
    for _ in range(_POWER_ITERATIONS):
        right = _orthonormal(_gradient_products(model, layers, batches, thin, transposed=True))
        thin = _orthonormal(_gradient_products(model, layers, batches, right, transposed=False))
    right = _orthonormal(_gradient_products(model, layers, batches, thin, transposed=True))
    images = _gradient_products(model, layers, batches, right, transposed=False)
    return {
        name: right[name] @ torch.linalg.svd(images[name], full_matrices=False).Vh[: a.shape[0]].t()
        for name, (_, a, _) in layers.items()
    }


def _orthonormal(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.qr(matrix).Q for name, matrix in matrices.items()}


def _gradient_products(
    model: nn.Module,
    layers: _Layers,
    batches: Sequence[Mapping[str, Any]],
    thin: Mapping[str, Tensor],
    *,
    transposed: bool,
) -> dict[str, Tensor]:
    """Return G F, or G' F, of each layer's gradient G = sum of dy' x and its thin matrix F, in one pass."""
    sums: dict[str, Tensor] = {}

    def added(name: str, x: Tensor, d_y: Tensor) -> None:
        factor = thin[name]
        rows = [each.reshape(-1, each.shape[-1]).to(factor.dtype) for each in (x, d_y)]
        read, other = reversed(rows) if transposed else rows
        product = other.t() @ (read @ factor)
        sums[name] = sums[name] + product if name in sums else product

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The gradient of the sum of layer and adapter is that of the layer.
            output.register_hook(partial(added, name, args[0].detach()))  # type: ignore[no-untyped-call]

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, (layer, _, _) in layers.items()]
    try:
        for index, batch in enumerate(batches):
            with torch.enable_grad():
                loss = _loss(model(**batch), index)
            # By B alone: nothing is added to the `grad` of what the user trains.
            torch.autograd.grad(loss, [b for _, _, b in layers.values()], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in sums or not sums[name].any():
            raise ValueError(f"no gradient reaches {name}: it does not run in these batches, or not before the loss")
        if not sums[name].isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite")
    return sums


def _loss(output: Any, index: int) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("the model returned no loss: a batch needs labels, or the model a loss of its own")
    if not loss.isfinite():
        raise ValueError(f"the loss of batch {index} is {loss.item()}")
    return loss
