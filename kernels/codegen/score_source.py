"""Print the Triton kernels that score a block's channels by low-rank predictions of its products.

`thin_products` stores u_i = x A_i; `scores` forms p_i = u_i B_i in registers and stores, a channel each, the norm of
f(p0, .., v0, ..) over the tokens that count. Every sum is in fp32 and in an order that the sizes alone decide: there
are no atomics, with which a near tie would be chosen differently from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.kernels.codegen.formula import parsed, select
from sparse_compile.kernels.codegen.kernel_text import Block, load_vectors, module_text, printed, shared_terms


@dataclass(frozen=True)
class ScoreSpec:
    """What tells the generated kernels of one score from those of another.

    Attributes:
        ranks: of the factors of each product, `p0` first.
        vectors: number of operands of one value a channel.
        formula: text of the formula.
    """

    ranks: tuple[int, ...]
    vectors: int
    formula: str

    @property
    def terms(self) -> dict[str, int]:
        """The rank of each product, by its symbol in the formula."""
        return {f"p{index}": rank for index, rank in enumerate(self.ranks)}


def padded_rank(rank: int) -> int:
    """Return the width of the tile that holds a rank: a power of two, as wide as `tl.dot` asks for at least."""
    return max(16, 1 << (rank - 1).bit_length())


def score_source(spec: ScoreSpec, title: str = "") -> str:
    """Return the source of a module with the kernels `thin_products` and `scores`."""
    names = list(spec.terms)
    strides = {kind: [f"{kind}_{name}_{end}" for name in names for end in ("row", "col")] for kind in "ab"}
    thin = [f"thin_{name}" for name in names]
    thin_parameters = [
        *("x", *(f"a_{name}" for name in names), *thin, "rows", "depth", "share", "x_row", "x_col", *strides["a"]),
        *("BLOCK_M: tl.constexpr", "BLOCK_K: tl.constexpr"),
    ]
    score_parameters = [
        *("valid", *thin, *(f"b_{name}" for name in names), *(f"vector_{index}" for index in range(spec.vectors))),
        *("y", "rows", "columns", "parts", *strides["b"], "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"),
    ]
    kernels = {
        "thin_products": (thin_parameters, _thin_products(spec)),
        "scores": (score_parameters, _scores(spec)),
    }
    return module_text(title, kernels, spec)


def _thin_products(spec: ScoreSpec) -> Block:
    """Store x A of BLOCK_M tokens, summed over one share of the depth.

    Scored tokens are few: without shares so were the programs, and each would read the whole depth alone.
    """
    body = Block()
    body.line("m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)")
    body.line("k = tl.arange(0, BLOCK_K)")
    for name, rank in spec.terms.items():
        body.line(f"r_{name} = tl.arange(0, {padded_rank(rank)})")
        body.line(f"{name} = tl.zeros((BLOCK_M, {padded_rank(rank)}), dtype=tl.float32)")
    body.line("for start in range(0, share, BLOCK_K):")
    body.line("position = (tl.program_id(1) * share + start + k).to(tl.int64)", 2)
    body.line("x_at = m.to(tl.int64)[:, None] * x_row + position[None, :] * x_col", 2)
    body.line("inside = (m[:, None] < rows) & (position[None, :] < depth)", 2)
    body.line("left = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)", 2)
    for name, rank in spec.terms.items():
        body.line(f"a_at = position[:, None] * a_{name}_row + r_{name}[None, :] * a_{name}_col", 2)
        body.line(f"there = (position[:, None] < depth) & (r_{name}[None, :] < {rank})", 2)
        body.line(f"right = tl.load(a_{name} + a_at, mask=there, other=0.0).to(tl.float32)", 2)
        body.line(f'{name} = tl.dot(left, right, {name}, input_precision="ieee")', 2)
    body.line("row = tl.program_id(1).to(tl.int64) * rows + m")
    for name, rank in spec.terms.items():
        # What pads the rank is 0 * inf, a NaN, where a token is not finite: it is not stored.
        body.line(f"kept = (m[:, None] < rows) & (r_{name}[None, :] < {rank})")
        body.line(f"tl.store(thin_{name} + row[:, None] * {rank} + r_{name}[None, :], {name}, mask=kept)")
    return body


def _scores(spec: ScoreSpec) -> Block:
    """Store the norms of BLOCK_N channels over all tokens that count."""
    body = Block()
    body.line("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)")
    body.line("m = tl.arange(0, BLOCK_M)")
    for name, rank in spec.terms.items():
        body.line(f"r_{name} = tl.arange(0, {padded_rank(rank)})")
        body.line(f"b_at = r_{name}.to(tl.int64)[:, None] * b_{name}_row + n[None, :] * b_{name}_col")
        body.line(f"inside = (r_{name}[:, None] < {rank}) & (n[None, :] < columns)")
        body.line(f"factor_{name} = tl.load(b_{name} + b_at, mask=inside, other=0.0).to(tl.float32)")
    load_vectors(body, spec.vectors)
    body.line("total = tl.zeros((BLOCK_N,), dtype=tl.float32)")
    body.line("for start in range(0, rows, BLOCK_M):")
    body.line("row = (start + m).to(tl.int64)", 2)
    for name, rank in spec.terms.items():
        body.line(f"there_{name} = (row[:, None] < rows) & (r_{name}[None, :] < {rank})", 2)
        body.line(f"sum_{name} = tl.zeros((BLOCK_M, {padded_rank(rank)}), dtype=tl.float32)", 2)
    body.line("for part in range(0, parts):", 2)
    for name, rank in spec.terms.items():
        body.line(f"at_{name} = (row + part * rows)[:, None] * {rank} + r_{name}[None, :]", 3)
        body.line(f"sum_{name} += tl.load(thin_{name} + at_{name}, mask=there_{name}, other=0.0)", 3)
    for name in spec.terms:
        body.line(f'{name} = tl.dot(sum_{name}, factor_{name}, input_precision="ieee")', 2)
    formula = parsed(spec.formula)
    (value,) = shared_terms(body, [formula], 2)
    body.line(f"hidden = {printed(value)}", 2)
    if formula.expression.has(select):
        # A comparison with a NaN is false; PyTorch's functions with a kink pass it on.
        for name in formula.operands:
            body.line(f"hidden = tl.where({name} == {name}, hidden, {name})", 2)
    body.line("counts = tl.load(valid + row, mask=row < rows, other=0).to(tl.int32) != 0", 2)
    body.line("hidden = tl.where(counts[:, None] & (n[None, :] < columns), hidden, 0.0)", 2)
    body.line("total += tl.sum(hidden * hidden, axis=0)", 2)
    body.line("tl.store(y + n, tl.sqrt(total), mask=n < columns)")
    return body
