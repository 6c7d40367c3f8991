"""Time and memory of a training step that keeps the zeros of a pruned model, for `lors.py --speed`.

Four arms train adapters of one pruned model, which they share:

* `eager`, `inductor`: masked by autograd (`lors_models.MaskedByAutograd`), op by op and compiled.
* `lors`, `lors-exact`: this backend with `preserve_weight_mask`, preset `none` (nothing else is optimised), with the
  straight-through gradients of the paper and with exact ones.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lors_models import SavedBytes, masked_by_autograd, prune, saved_tensors
from measure import interleaved, step_bytes
from rows import environment
from torch import Tensor, nn
from workloads import Workload, adapted_model, base_model, make_batch

from sparse_compile.cli.paired import Spread, paired_ratio, spread, training_step

PEERS = ("eager", "inductor")
LORS = {"lors": "straight-through", "lors-exact": "exact"}
ARMS = (*PEERS, *LORS)


@dataclass(frozen=True)
class SpeedRow:
    """One arm on one workload.

    Attributes:
        kind: `"speed"`.
        workload: its sizes; `label` is its name with every size that differs.
        pattern: of the pruned weights.
        arm: a name of `ARMS`.
        rounds: measured steps.
        step_seconds: duration of a step: forward, backward, optimizer.
        ratios: by peer, how many times faster than it a step is, paired within rounds.
        linear_saved: what the adapted linear layers alone save for their backward, in bytes.
        step_bytes: most bytes of tensors that a step had at once, beside those that live longer.
        first_call_seconds: the first step, which compiles, with empty caches.
        first_loss: loss of the first step; all arms compute one function.
    """

    kind: str
    workload: Workload
    label: str
    pattern: str
    arm: str
    rounds: int
    step_seconds: Spread
    ratios: dict[str, Spread]
    linear_saved: SavedBytes
    step_bytes: int
    first_call_seconds: float
    first_loss: float
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: dict[str, Any]
    date: str
    command: str


def measure(
    workload: Workload,
    pattern: str,
    arms: Sequence[str],
    rounds: int,
    warm_up: int,
    clock: Callable[[], float],
    arguments: Sequence[str],
) -> list[SpeedRow]:
    """Measure the arms in turns on a model pruned by magnitude; steps are timed by `clock`.

    Raises:
        RuntimeError: two arms begin with different losses, so they train different functions.
    """
    surroundings = environment("lors.py", arguments)
    base, batch = base_model(workload), make_batch(workload)
    prune(base, "magnitude", pattern)
    models = {arm: arm_model(base, workload, arm) for arm in arms}
    steps = {arm: training_step(_compiled(model, arm), batch) for arm, model in models.items()}
    with tempfile.TemporaryDirectory() as caches:
        times = interleaved(steps, Path(caches), rounds, warm_up, clock)
    losses = {arm: times[arm].loss for arm in arms}
    if max(losses.values()) - min(losses.values()) > 1e-3 * max(losses.values()):
        raise RuntimeError(f"the arms train different functions: their first losses are {losses}")
    peaks = {arm: step_bytes(step) for arm, step in steps.items()}
    return [
        SpeedRow(
            "speed", workload, workload.label, pattern, arm, rounds, spread(times[arm].steps),
            {peer: paired_ratio(times[peer].steps, times[arm].steps) for peer in PEERS if peer in arms and peer != arm},
            linear_saved(models[arm], arm, workload), peaks[arm], times[arm].first_call, times[arm].loss,
            **surroundings,
        )
        for arm in arms
    ]  # fmt: skip


def arm_model(base: nn.Module, workload: Workload, arm: str) -> nn.Module:
    """Return a model with adapters as after some training, B not zero, so that masks make a difference."""
    model = adapted_model(base, workload)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return masked_by_autograd(model) if arm in PEERS else model


def _compiled(model: nn.Module, arm: str) -> Any:
    if arm == "eager":
        return model
    if arm == "inductor":
        return torch.compile(model, backend="inductor")
    options = {"preset": "none", "preserve_weight_mask": "auto", "mask_gradient": LORS[arm]}
    return torch.compile(model, backend="sparselora", options=options)


class LinearLayers(nn.Module):
    """The adapted linear layers of a Llama and nothing between them, each on the input that it would share.

    Args:
        model: with adapters in whichever form; its layers are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        (blocks,) = (module for name, module in model.named_modules() if name.endswith("model.layers"))
        self.groups = nn.ModuleList()
        for block in blocks:  # type: ignore[attr-defined]
            attention, mlp = block.self_attn, block.mlp
            layers = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
            layers += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
            self.groups += [nn.ModuleList(group) for group in layers]

    def inputs(self, tokens: int) -> list[Tensor]:
        """Draw an input (tokens, in) for each group."""
        widths = (_weight(group[0]).shape[1] for group in self.groups)
        return [torch.randn(tokens, width, requires_grad=True) for width in widths]

    def forward(self, *inputs: Tensor) -> Tensor:
        sums = [layer(x).sum() for x, group in zip(inputs, self.groups, strict=True) for layer in group]
        return torch.stack(sums).sum()


def _weight(layer: Any) -> Tensor:
    return layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight


def linear_saved(model: nn.Module, arm: str, workload: Workload) -> SavedBytes:
    """Count what the adapted layers of a workload save in one forward of all its tokens."""
    layers = LinearLayers(model)
    call, inputs = _compiled(layers, arm), layers.inputs(workload.batch * workload.length)
    call(*inputs).backward()  # compiles, outside the hooks that count
    with saved_tensors(layers) as saved:
        loss = call(*inputs)
    loss.backward()
    return saved


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return the cells of a table of rows as plain data; ratios of memory are to the arm `eager`."""
    peer = next((row["linear_saved"]["others"] for row in rows if row["arm"] == "eager"), None)
    cells: list[list[object]] = []
    for row in rows:
        saved = row["linear_saved"]
        times = [f"{row['ratios'][each]['median']:.2f}x" if each in row["ratios"] else "1" for each in PEERS]
        cells.append(
            [
                f"`{row['arm']}`",
                f"{row['step_seconds']['median']:.3f} s",
                *times,
                f"{saved['others'] / 2**20:.1f} MiB",
                f"{saved['others'] / peer:.2f}x" if peer else "-",
                f"{(saved['others'] + saved['parameters']) / 2**20:.1f} MiB",
                f"{row['step_bytes'] / 2**20:.0f} MiB",
            ]
        )
    return cells


HEAD = (
    "arm", "step", "faster than `eager`", "than `inductor`", "saved by linear layers", "of `eager`",
    "parameters included", "all tensors of a step",
)  # fmt: skip


def plain(rows: Sequence[SpeedRow]) -> list[dict[str, Any]]:
    """Return rows as plain data for JSON."""
    return [dataclasses.asdict(row) for row in rows]
