"""Write the weighted sum of adapters as one PEFT adapter, layer by layer."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparse_compile.bank.adapter import CONFIG, WEIGHTS, Adapter, factor_key
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.lowrank import EXACT_RANK, Factored, Term, refactor

__all__ = ["Composition", "compose_adapter"]

COMPOSITION = "composition.json"
"""The file beside the adapter that says what it was composed of."""


@dataclass(frozen=True)
class Composition:
    """A composed adapter.

    Attributes:
        folder: a PEFT adapter, which `PeftModel.from_pretrained` loads.
        weights: of the bank's adapters, by name.
        rank: of the adapter.
        error: what its rank leaves out of the sum, |M - B A| / |M| over all layers (Frobenius); an estimate where the
            sum of ranks is above 1024.
        exact: whether every layer was taken apart exactly.
        temperature: T of the weights; None where they were given, or come from a network.
        bank_error: mean error of the weighting on the bank itself, by leave-one-out; None where it was not computed.
    """

    folder: Path
    weights: Mapping[str, float]
    rank: int
    error: float
    exact: bool
    temperature: float | None = None
    bank_error: float | None = None


@torch.no_grad()
def compose_adapter(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    out: Path,
    rank: int | None = None,
    *,
    progress: bool = True,
    exact_rank: int = EXACT_RANK,
) -> Composition:
    """Write sum_i w_i s_i B_i A_i as an adapter.

    A layer that an adapter does not change counts as zero. In memory are the result, and of one layer what `refactor`
    needs.

    Args:
        adapters: open, by name.
        weights: of each; those of weight zero are not read.
        out: a folder that is not there; it appears whole.
        rank: of the result; None takes the largest of a layer of the adapters.
        progress: show a bar.
        exact_rank: see `refactor`.

    Raises:
        BankError: the adapters do not fit together, all weights are zero, or the folder is there.
    """
    if out.exists():
        raise BankError(f"{out} is there already; name a new folder")
    terms = {name: Term(adapters[name], weight) for name, weight in weights.items() if weight}
    if not terms or not all(math.isfinite(each.weight) for each in terms.values()):
        raise BankError("an adapter is composed of at least one other, with weights that are finite and not all zero")
    layers = _layers({name: term.adapter for name, term in terms.items()})
    leader = max(terms.values(), key=lambda term: abs(term.weight)).adapter
    rank = max(term.adapter.largest_rank for term in terms.values()) if rank is None else rank
    if rank < 1:
        raise BankError(f"rank={rank} is no rank; it is at least 1")
    scale = next(iter(leader.layers.values())).scale
    tensors: dict[str, Tensor] = {}
    found: dict[str, Factored] = {}
    for name in tqdm(layers, desc="composing", unit="layer", disable=not progress):
        each = refactor(list(terms.values()), name, rank, exact_rank)
        # The scale of the leader, so that a training that starts here moves as that of the leader did.
        tensors[factor_key(name, "A")] = each.a.div_(math.sqrt(scale))
        tensors[factor_key(name, "B")] = each.b.div_(math.sqrt(scale))
        found[name] = each
    square, kept = (sum(getattr(each, part) for each in found.values()) for part in ("square", "kept"))
    result = Composition(
        out,
        dict(weights),
        max(each.a.shape[0] for each in found.values()),
        math.sqrt(max(0.0, 1 - kept / square)) if square else 0.0,
        all(each.exact for each in found.values()),
    )
    ranks = {name: each.a.shape[0] for name, each in found.items()}
    _write(out, tensors, _config(leader, result.rank, ranks, scale), result)
    return result


def _layers(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return the layers that any of the adapters changes, which must agree on what they have in common."""
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for path, layer in adapter.layers.items():
            sizes = (layer.outputs, layer.inputs)
            other, expected = seen.setdefault(path, (name, sizes))
            if sizes != expected:
                raise BankError(
                    f"{path} is {expected} in {other} and {sizes} in {name}: remove one of them from the bank"
                )
    turned = {bool(adapter.config.get("fan_in_fan_out")) for adapter in adapters.values()}
    if len(turned) > 1:
        raise BankError("fan_in_fan_out differs between the adapters, so they are of different models")
    return sorted(seen)


def _config(leader: Adapter, rank: int, ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """Return the configuration for PEFT: layers by their whole path, and alpha such that alpha / r is the scale."""
    other = {name: each for name, each in ranks.items() if each != rank}
    kept = {
        name: leader.config.get(name) for name in ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    }
    return {
        **kept,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": leader.config.get("lora_dropout", 0.0),
        "fan_in_fan_out": bool(leader.config.get("fan_in_fan_out")),
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: scale * each for name, each in other.items()},
    }


def _write(out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], result: Composition) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=".unfinished-"))
    try:
        save_file(dict(tensors), made / WEIGHTS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        plain = {name: value for name, value in asdict(result).items() if name != "folder"}
        (made / COMPOSITION).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        made.chmod(0o755)
        made.rename(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
