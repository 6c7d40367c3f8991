"""Measure how well the SVD predictor chooses channels, on a real model and real text.

    python benchmarks/predictor_quality.py --model DIR --data FILE.jsonl [--out docs/predictor.md]

For each block and each kind of site (FFN, V/O, Q/K) the channels chosen by the predictor are compared with those chosen
by the true activations (the oracle) and with random ones: how many they share, and how far the block's output moves.
The sites are run alone, on the inputs of the dense model, by the masked execution of `sparse_compile.reference`:
nothing is compiled, and nothing but the choice of channels differs. Runs on the CPU; the numbers depend on the
arguments alone.

Prints Markdown. With `--out` the tables replace those of the same model in that file, between its two marker lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from markdown import replace_tables, table
from predictor_sites import Probe, load_model, measure
from torch import Tensor

from sparse_compile.reference import PredictorTokens

RANK = 8
SPARSITIES = {"FFN": (0.5, 0.9, 0.97, 0.99), "V/O": (0.2, 0.5, 0.75), "Q/K": (0.2, 0.5, 0.75)}
# What the backend reads by default, and for FFNs the published code's mean and the paper's formula beside it.
READ: dict[str, tuple[PredictorTokens, ...]] = {"FFN": (16, "mean", "all"), "V/O": ("all",), "Q/K": ("all",)}
_READ_NAMES: dict[PredictorTokens, str] = {16: "16 tokens", "mean": "mean token", "all": "all tokens"}
SWEEP_SPARSITY = {"FFN": 0.9, "V/O": 0.5, "Q/K": 0.5}
SWEEP_RANKS = (2, 4, 8, 16, 32)
SWEEP_TOKENS: tuple[PredictorTokens, ...] = ("mean", 16, "all")
RANDOM_SEEDS = range(5)
# Where oracle and random channels give the same error to this much, it makes no sense to place a third between them.
LEAST_SPAN = 0.03


# --- Measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """How three choices of channels compare at one site, means over batches.

    Attributes:
        kept: k, the channels kept, of `channels`.
        channels: n.
        overlap: |predicted and oracle| / k.
        overlap_random: The same for random channels, measured; k / n is expected.
        error: Relative error of the residual update over context tokens, predicted channels.
        error_oracle: The same with the oracle's channels.
        error_random: The same with random channels.
        all_error: As `error`, over all tokens that are not padding; so are the next two.
        all_error_oracle: As `error_oracle`.
        all_error_random: As `error_random`.
    """

    kept: int
    channels: int
    overlap: float
    overlap_random: float
    error: float
    error_oracle: float
    error_random: float
    all_error: float
    all_error_oracle: float
    all_error_random: float


def share(chosen: Tensor, oracle: Tensor) -> float:
    """Return the share of the oracle's channels that were chosen."""
    return torch.isin(oracle, chosen).float().mean().item()


@torch.no_grad()
def quality(
    sites: Sequence[Probe], sparsity: float, read: Sequence[PredictorTokens], rank: int = RANK
) -> list[Quality]:
    """Compare predicted, oracle and random channels at one site.

    The oracle is the paper's criterion: norms of the true activations over all context tokens.

    Args:
        sites: The same site, in one probe for each batch.
        sparsity: Share of channels dropped.
        read: The tokens that the predictor reads.
        rank: Rank of the predictor.

    Returns:
        One result for each element of `read`, against the same oracle and the same random channels.
    """
    rows: list[list[tuple[float, ...]]] = [[] for _ in read]
    for index, site in enumerate(sites):
        oracle = site.choose(sparsity, None, "all")
        draws = [random_channels(site.channels, len(oracle), 1000 * index + seed) for seed in RANDOM_SEEDS]
        overlap_random = statistics.fmean(share(draw, oracle) for draw in draws)
        errors_random = [statistics.fmean(pair) for pair in zip(*map(site.errors, draws), strict=True)]
        errors_oracle = site.errors(oracle)
        for row, tokens in zip(rows, read, strict=True):
            predicted = site.choose(sparsity, rank, tokens)
            errors = zip(site.errors(predicted), errors_oracle, errors_random, strict=True)
            row.append((share(predicted, oracle), overlap_random, *itertools.chain.from_iterable(errors)))
    return [Quality(len(oracle), site.channels, *map(statistics.fmean, zip(*row, strict=True))) for row in rows]


def random_channels(channels: int, kept: int, seed: int) -> Tensor:
    """Choose `kept` of `channels` at random, sorted."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:kept].sort().values


@torch.no_grad()
def sweep(sites: Iterable[Probe], rank: int | None, tokens: PredictorTokens) -> tuple[float, float]:
    """Return the mean overlap with the oracle, and the mean error over context tokens, over sites of one kind."""
    rows = []
    for site in sites:
        sparsity = SWEEP_SPARSITY[site.kind]
        chosen = site.choose(sparsity, rank, tokens)
        rows.append((share(chosen, site.choose(sparsity, None, "all")), site.errors(chosen)[0]))
    overlap, error = map(statistics.fmean, zip(*rows, strict=True))
    return overlap, error


def mean_over(qualities: Sequence[Quality]) -> Quality:
    """Return the mean over blocks; k and n are equal in all of them."""
    values = zip(*map(dataclasses.astuple, qualities), strict=True)
    kept, channels, *means = map(statistics.fmean, values)
    return Quality(int(kept), int(channels), *means)


# --- Tables -----------------------------------------------------------------------------------------------------------


def recovered(q: Quality) -> str:
    """Say how far the predicted error has come from the random (0%) to the oracle's (100%), where these differ."""
    span = q.error_random - q.error_oracle
    return f"{(q.error_random - q.error) / span:.0%}" if span >= LEAST_SPAN else "-"


def report(by_site: dict[tuple[str, int], list[Probe]], title: str, about: str) -> str:
    """Return all tables of one model as Markdown."""
    # (label of the kind and what is read, sparsity) -> one result a block.
    found: dict[tuple[str, float], list[Quality]] = {}
    for (kind, _), sites in by_site.items():
        for sparsity in SPARSITIES[kind]:
            for tokens, q in zip(READ[kind], quality(sites, sparsity, READ[kind]), strict=True):
                found.setdefault((f"{kind}, {_READ_NAMES[tokens]}", sparsity), []).append(q)
    parts = [f"### {title}", about, "Means over blocks, rank 8:", _summary(found)]
    parts += ["Other ranks and tokens read, as overlap / error over context tokens, means over blocks:"]
    parts.append(_sweep_table(by_site))
    for label in dict.fromkeys(label for label, _ in found):
        parts += [f"Block by block, {label}, rank 8:", _block_table(found, label)]
    return "\n\n".join(parts)


def _summary(found: dict[tuple[str, float], list[Quality]]) -> str:
    head = ["site", "sparsity", "kept", "overlap", "worst block", "random", "error", "oracle", "random", "recovered"]
    head += ["error, all tokens", "oracle", "random"]
    rows = []
    # Grouped by what is read first: the loop that filled `found` has the sparsities outside.
    for label in dict.fromkeys(label for label, _ in found):
        for (other, sparsity), blocks in found.items():
            if other == label:
                q = mean_over(blocks)
                row = [label, str(sparsity), f"{q.kept}/{q.channels}", q.overlap, min(b.overlap for b in blocks)]
                row += [q.overlap_random, q.error, q.error_oracle, q.error_random, recovered(q)]
                rows.append([*row, q.all_error, q.all_error_oracle, q.all_error_random])
    return table(head, rows)


def _block_table(found: dict[tuple[str, float], list[Quality]], label: str) -> str:
    head = ["sparsity", "block", "overlap", "random", "error", "oracle", "random", "recovered"]
    return table(
        head,
        (
            [str(sparsity), block, q.overlap, q.overlap_random, q.error, q.error_oracle, q.error_random, recovered(q)]
            for (a, sparsity), blocks in found.items()
            if a == label
            for block, q in enumerate(blocks)
        ),
    )


def _sweep_table(by_site: dict[tuple[str, int], list[Probe]]) -> str:
    head = ["site", "sparsity", "tokens read", *(f"rank {rank}" for rank in SWEEP_RANKS), "true layers"]
    rows = []
    for kind, sparsity in SWEEP_SPARSITY.items():
        sites = [probe for (a, _), group in by_site.items() if a == kind for probe in group]
        for tokens in SWEEP_TOKENS:
            cells = ["{:.2f} / {:.2f}".format(*sweep(sites, rank, tokens)) for rank in (*SWEEP_RANKS, None)]
            rows.append([kind, str(sparsity), str(tokens), *cells])
    return table(head, rows)


@torch.no_grad()
def energy(model: Any) -> str:
    """Say which share of the weights' squared norm the first singular values hold."""
    shares = []
    for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        squares = [torch.linalg.svdvals(layer.get_submodule(name).weight).square() for layer in model.model.layers]
        share = statistics.fmean((values[:RANK].sum() / values.sum()).item() for values in squares)
        shares.append(f"{name.rpartition('.')[2]} {share:.0%}")
    return f"Rank {RANK} holds of the weights' squared norm: {', '.join(shares)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama-like model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, help="Markdown file whose tables of this model are replaced")
    args = parser.parse_args(arguments)
    by_site = measure(args.model, args.data, batches=args.batches, batch_size=args.batch_size)
    one_block = next(iter(by_site.values()))
    context, tokens = (sum(int(getattr(site, name).sum()) for site in one_block) for name in ("context", "tokens"))
    source = f"`{args.data.parent.name}/{args.data.name}`"
    about = (
        f"{args.batches} batches of {args.batch_size} records of {source}: {tokens} tokens, {context} of them context. "
        f"fp32, torch {torch.__version__}, transformers {transformers.__version__}.\n{energy(load_model(args.model))}"
    )
    text = report(by_site, args.model.name, about)
    if args.out is None:
        sys.stdout.write(text + "\n")
    else:
        replace_tables(args.out, args.model.name, text)


if __name__ == "__main__":
    main()
