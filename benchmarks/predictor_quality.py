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
import functools
import itertools
import json
import re
import statistics
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from sparse_compile.factors import factorize
from sparse_compile.reference import (
    MaskedAttention,
    MaskedFFN,
    PredictorTokens,
    Projection,
    ffn_scores,
    kept_count,
    masked_dense,
    output_mask_from_labels,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)

Encode: TypeAlias = Callable[[str], list[int]]

RANK = 8
SPARSITIES = {"FFN": (0.5, 0.9, 0.97, 0.99), "V/O": (0.2, 0.5, 0.75), "Q/K": (0.2, 0.5, 0.75)}
# What the backend reads by default, and for FFNs the paper's formula beside it.
READ: dict[str, tuple[PredictorTokens, ...]] = {"FFN": ("mean", "all"), "V/O": ("all",), "Q/K": ("all",)}
_READ_NAMES: dict[PredictorTokens, str] = {"mean": "mean token", "all": "all tokens"}
SWEEP_SPARSITY = {"FFN": 0.9, "V/O": 0.5, "Q/K": 0.5}
SWEEP_RANKS = (2, 4, 8, 16, 32)
SWEEP_TOKENS: tuple[PredictorTokens, ...] = ("mean", 16, "all")
RANDOM_SEEDS = range(5)
# Where oracle and random channels give the same error to this much, it makes no sense to place a third between them.
LEAST_SPAN = 0.03


# --- Text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences.

    Attributes:
        input_ids: Int64 (B, S).
        attention_mask: Int64 (B, S), zero at padding.
        labels: Int64 (B, S), -100 at the question and at padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def load_encoder(folder: Path) -> Encode:
    """Return the function from text to token ids of a model folder, without special tokens."""
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return lambda text: tokenizer.encode(text, add_special_tokens=False)
    return sentencepiece_bpe((folder / "tokenizer.model").read_bytes())


def sentencepiece_bpe(model: bytes) -> Encode:
    """Return the encoder of a SentencePiece BPE model with identity normalisation and byte fallback.

    A word starts as its characters; of all neighbours that make a piece, those with the highest score are merged, the
    leftmost first; a character that is no piece becomes its bytes. Written out here, because a vocabulary that small
    is not worth a dependency. No piece may hold an inner space, so that words are encoded apart.

    Args:
        model: The protobuf file, `ModelProto`: pieces in field 1 (piece 1, score 2, type 3).
    """
    pieces = [dict(_protobuf_fields(value)) for field, value in _protobuf_fields(model) if field == 1]
    names = [piece[1].decode() for piece in pieces]
    normal = {name: i for i, (name, piece) in enumerate(zip(names, pieces, strict=True)) if piece.get(3, 1) == 1}
    score = {name: struct.unpack("<f", pieces[i].get(2, bytes(4)))[0] for name, i in normal.items()}
    first_byte = names.index("<0x00>")
    assert not any("▁" in name[1:] for name in normal), "a piece crosses a space"

    @functools.cache
    def encode_word(word: str) -> tuple[int, ...]:
        parts = list(word)
        while True:
            pairs = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = ([normal[part]] if part in normal else [first_byte + byte for byte in part.encode()] for part in parts)
        return tuple(itertools.chain.from_iterable(ids))

    def encode(text: str) -> list[int]:
        words = re.split(" +", text.strip(" "))
        return [token for word in words for token in encode_word("▁" + word)]

    return encode


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the raw value of each field: an int, or bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[position : position + size]
        position += size


def read_batches(data: Path, encode: Encode, config: Any, *, batches: int, batch_size: int) -> list[Batch]:
    """Read the first questions and answers of a JSON-lines file that fit the model's positions.

    Args:
        data: Records with the keys `question` and `answer`.
        encode: From `load_encoder`.
        config: The model's configuration.
        batches: How many batches.
        batch_size: Sequences per batch.

    Raises:
        ValueError: If the file holds too few records that fit.
    """
    examples: list[tuple[list[int], list[int]]] = []
    with data.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            question = [config.bos_token_id, *encode(record["question"])]
            answer = [*encode(record["answer"]), config.eos_token_id]
            if len(question) + len(answer) <= config.max_position_embeddings:
                examples.append((question, answer))
            if len(examples) == batches * batch_size:
                break
        else:
            raise ValueError(f"{data} holds only {len(examples)} records that fit, not {batches * batch_size}")
    return [_pad(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def _pad(examples: Sequence[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(question) + len(answer) for question, answer in examples)
    ids, mask, labels = (torch.full((len(examples), length), value) for value in (0, 0, -100))
    for row, (question, answer) in enumerate(examples):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        mask[row, :end] = 1
        labels[row, len(question) : end] = torch.tensor(answer)
    return Batch(ids, mask, labels)


# --- Sites ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Probe:
    """One kind of site in one block, with the activations of one batch.

    Attributes:
        kind: `"FFN"`, `"V/O"` or `"Q/K"`.
        block: Index of the block.
        channels: n, the number of channels to choose from.
        score: Scores (n,) from a rank and the tokens to read; rank None reads the true layers.
        run: The residual update of the block, (B, S, hidden), with these channels kept for context tokens.
        dense: The same with all channels.
        context: Bool (B, S): context tokens that are not padding.
        tokens: Bool (B, S): all tokens that are not padding.
    """

    kind: str
    block: int
    channels: int
    score: Callable[[int | None, PredictorTokens], Tensor]
    run: Callable[[Tensor], Tensor]
    dense: Tensor
    context: Tensor
    tokens: Tensor

    def choose(self, sparsity: float, rank: int | None, tokens: PredictorTokens) -> Tensor:
        """Return the channels kept, from factors of this rank; rank None is the oracle."""
        return top_channels(self.score(rank, tokens), kept_count(self.channels, sparsity))

    def errors(self, kept: Tensor) -> tuple[float, float]:
        """Return ||sparse - dense|| / ||dense|| of the residual update over context tokens, and over all tokens."""
        difference = self.run(kept) - self.dense
        context, everywhere = (
            (difference[mask].norm() / self.dense[mask].norm()).item() for mask in (self.context, self.tokens)
        )
        return context, everywhere


@dataclass(frozen=True, eq=False)
class _Call:
    """What a module of the dense model was called with, and what it returned."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def again(self) -> Tensor:
        return _first(self.module(*self.args, **self.kwargs))


def _first(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


class Factors:
    """Give the low-rank factors that the backend would compute, each once."""

    def __init__(self) -> None:
        self._found: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: Any, rank: int | None) -> Projection:
        """Return the factors of a linear layer, or the layer itself for rank None."""
        if rank is None:
            return layer  # type: ignore[no-any-return]
        if (layer, rank) not in self._found:
            factors = factorize(layer.weight, rank, seed=0)
            self._found[layer, rank] = factors.a, factors.b
        return self._found[layer, rank]


@torch.no_grad()
def probes(model: Any, batch: Batch, factors: Factors) -> list[Probe]:
    """Run the dense model once and return a probe for each site, block after block.

    Args:
        model: A Llama-like causal language model: blocks in `model.model.layers`, the usual names of projections.
        batch: What to run.
        factors: Where predictors come from.
    """
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls[module] = _Call(module, args, kwargs, _first(result))

    layers = model.model.layers
    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for layer in layers
        for module in (layer.mlp, layer.self_attn)
    ]
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    output_mask = output_mask_from_labels(batch.labels)
    masks = output_mask, scored_positions(output_mask, batch.attention_mask), batch.attention_mask.bool()
    found = []
    for block, layer in enumerate(layers):
        found.append(_ffn_probe(block, calls[layer.mlp], factors, *masks))
        found += _attention_probes(block, calls[layer.self_attn], model.config, factors, *masks)
    return found


def _ffn_probe(block: int, call: _Call, factors: Factors, output: Tensor, scored: Tensor, real: Tensor) -> Probe:
    mlp = call.module

    def score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        projections = [factors(layer, rank) for layer in (mlp.gate_proj, mlp.up_proj)]
        region = lambda gate, up: mlp.act_fn(gate) * up  # noqa: E731
        return ffn_scores(call.args[0], scored, projections, region, predictor_tokens=tokens)

    def run(kept: Tensor) -> Tensor:
        with masked_dense([MaskedFFN(mlp.down_proj, kept)], output):
            return call.again()

    return Probe("FFN", block, mlp.down_proj.in_features, score, run, call.result, scored, real)


def _attention_probes(
    block: int, call: _Call, config: Any, factors: Factors, output: Tensor, scored: Tensor, real: Tensor
) -> list[Probe]:
    attention, x = call.module, call.kwargs["hidden_states"]
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    groups = config.num_attention_heads // config.num_key_value_heads
    channels = k.out_features
    everything = torch.arange(channels)

    def qk_score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        found = factors(q, rank), factors(k, rank)
        head_dim = attention.head_dim
        return query_key_scores(x, scored, *found, head_dim=head_dim, groups=groups, predictor_tokens=tokens)

    def vo_score(rank: int | None, tokens: PredictorTokens) -> Tensor:
        return value_scores(x, scored, factors(v, rank), predictor_tokens=tokens)

    def run(kept_qk: Tensor, kept_vo: Tensor) -> Tensor:
        with masked_dense([MaskedAttention(q, k, v, o, kept_qk, kept_vo, attention.head_dim, groups)], output):
            return call.again()

    shared = call.result, scored, real
    return [
        Probe("V/O", block, channels, vo_score, lambda kept: run(everything, kept), *shared),
        Probe("Q/K", block, channels, qk_score, lambda kept: run(kept, everything), *shared),
    ]


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


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; floats with two digits behind the point."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def measure(model_dir: Path, data: Path, *, batches: int, batch_size: int) -> dict[tuple[str, int], list[Probe]]:
    """Run a model over real text; return the probes of each kind and block, one for each batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    texts = read_batches(data, load_encoder(model_dir), model.config, batches=batches, batch_size=batch_size)
    factors = Factors()
    by_site: dict[tuple[str, int], list[Probe]] = {}
    for batch in texts:
        for probe in probes(model, batch, factors):
            by_site.setdefault((probe.kind, probe.block), []).append(probe)
    return by_site


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
    about = (
        f"{args.batches} batches of {args.batch_size} records of `{args.data.parent.name}/{args.data.name}`: {tokens} "
        f"tokens, {context} of them context. torch {torch.__version__}, transformers {transformers.__version__}, fp32."
    )
    text = report(by_site, args.model.name, about)
    if args.out is None:
        sys.stdout.write(text + "\n")
    else:
        _replace(args.out, args.model.name, text)


def _replace(document: Path, name: str, text: str) -> None:
    """Put the tables of a model between its marker lines."""
    begin, end = f"<!-- tables of {name} -->", f"<!-- end of tables of {name} -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"{document} has no lines {begin!r} and {end!r} to put the tables between")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
