"""Print the Triton kernels of a fused product as the source of a module.

`products` computes y = f(p0, .., t0, .., v0, ..) tile by tile: each p and t is a product whose sums stay in registers,
each v one value a channel, f the formula. `gradients` computes d y * df/dp and the like from saved p. Sums are fp32,
offsets of rows are int64, ragged edges are masked, and indices are loaded in the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sympy

from sparse_compile.kernels.codegen import packed_tiles
from sparse_compile.kernels.codegen.formula import Formula, parsed
from sparse_compile.kernels.codegen.kernel_text import Block, load_vectors, module_text, printed, shared_terms
from sparse_compile.kernels.codegen.packed_tiles import FourBit

Gather = Literal["rows", "depth", "none"]


@dataclass(frozen=True)
class Term:
    """One product x @ M.T.

    Attributes:
        name: symbol of the formula, such as `"p0"`.
        source: index of its x among those of the kernel; terms of one x are computed in one loop over its columns.
        gather: M is W[idx] (`"rows"`), W[:, idx] (`"depth"`) or W (`"none"`).
        packed: how W is stored, where it is in 4 bits; W is the stored weight if rows are gathered, else its transpose.
    """

    name: str
    source: int
    gather: Gather
    packed: FourBit | None = None


@dataclass(frozen=True)
class ProductSpec:
    """What tells one generated product kernel from another.

    Attributes:
        terms: the products.
        vectors: number of operands of one value a channel.
        formula: text of the formula.
        saves: names of the terms that are stored for the backward.
    """

    terms: tuple[Term, ...]
    vectors: int
    formula: str
    saves: tuple[str, ...] = ()


@dataclass(frozen=True)
class GradientSpec:
    """What tells one generated kernel of gradients from another.

    Attributes:
        saved: names of the products that were stored.
        thin: names of the terms that are computed again.
        vectors: number of operands of one value a channel.
        formulas: text of each derivative.
    """

    saved: tuple[str, ...]
    thin: tuple[str, ...]
    vectors: int
    formulas: tuple[str, ...]


def product_source(spec: ProductSpec, title: str = "") -> str:
    """Return the source of a module with the kernel `products`."""
    formula = parsed(spec.formula)
    # One tile of registers holds the sum of all products, where the formula is nothing else.
    merged = _sums_all(formula, spec)
    accumulators = {term.name: "total" if merged else term.name for term in spec.terms}
    body = Block()
    _positions(body, grouped=True)
    for term in spec.terms:
        loads = term.gather == "rows"
        index = f"tl.load(channels_{term.name} + n, mask=n < columns, other=0)" if loads else "n"
        body.line(f"w_rows_{term.name} = {index}.to(tl.int64)")
    for name in dict.fromkeys(accumulators.values()):
        body.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)")
    for source in sorted({term.source for term in spec.terms}):
        _loop(body, source, [term for term in spec.terms if term.source == source], accumulators)
    load_vectors(body, spec.vectors)
    body.line("at = m.to(tl.int64)[:, None] * y_row + n[None, :]")
    body.line("inside = (m[:, None] < rows) & (n[None, :] < columns)")
    if merged:
        rest = formula.expression.subs({sympy.Symbol(term.name): 0 for term in spec.terms})
        formula = Formula.of(sympy.Symbol("total") + rest)
    _store(body, {"y": formula})
    for name in spec.saves:
        body.line(f"tl.store(saved_{name} + at, {name}.to(saved_{name}.dtype.element_ty), mask=inside)")
    return module_text(title, {"products": (_product_parameters(spec), body)}, spec)


def gradient_source(spec: GradientSpec, title: str = "") -> str:
    """Return the source of a module with the kernel `gradients`."""
    body = Block()
    _positions(body, grouped=False)
    body.line("at = m.to(tl.int64)[:, None] * y_row + n[None, :]")
    body.line("inside = (m[:, None] < rows) & (n[None, :] < columns)")
    body.line("d_at = m.to(tl.int64)[:, None] * d_y_row + n[None, :] * d_y_column")
    body.line("d = tl.load(d_y + d_at, mask=inside, other=0.0).to(tl.float32)")
    for name in spec.saved:
        body.line(f"{name} = tl.load(saved_{name} + at, mask=inside, other=0.0).to(tl.float32)")
    for position, name in enumerate(spec.thin):
        body.line(f"w_rows_{name} = n.to(tl.int64)")
        body.line(f"{name} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)")
        _loop(body, position, [Term(name, position, "none")], {name: name})
    load_vectors(body, spec.vectors)
    derivative = {
        f"gradient_{i}": Formula.of(sympy.Symbol("d") * parsed(each).expression) for i, each in enumerate(spec.formulas)
    }
    _store(body, derivative)
    return module_text(title, {"gradients": (_gradient_parameters(spec), body)}, spec)


_TILE = ("PRECISION", "INTERPRETED", "BLOCK_M", "BLOCK_N", "BLOCK_K")


def _term_parameters(terms: Sequence[Term]) -> list[str]:
    sources = sorted({term.source for term in terms})
    pointers = [f"x_{source}" for source in sources]
    pointers += [f"w_{term.name}" for term in terms]
    pointers += [f"channels_{term.name}" for term in terms if term.gather != "none"]
    pointers += [name for term in terms if term.packed for name in packed_tiles.pointers(term.name, term.packed)]
    sizes = [name for i in sources for name in (f"depth_{i}", f"x_{i}_row", f"x_{i}_col")]
    sizes += [f"w_{term.name}_{end}" for term in terms for end in (("row",) if term.packed else ("row", "col"))]
    return [*pointers, *sizes]


def _product_parameters(spec: ProductSpec) -> list[str]:
    vectors = [f"vector_{index}" for index in range(spec.vectors)]
    saved = [f"saved_{name}" for name in spec.saves]
    constants = [f"{name}: tl.constexpr" for name in (*_TILE, "GROUP")]
    return [*_term_parameters(spec.terms), *vectors, "y", *saved, "rows", "columns", "y_row", *constants]


def _gradient_parameters(spec: GradientSpec) -> list[str]:
    thin = _term_parameters([Term(name, index, "none") for index, name in enumerate(spec.thin)])
    vectors = [f"vector_{index}" for index in range(spec.vectors)]
    stored = ["d_y", *(f"saved_{name}" for name in spec.saved)]
    results = [f"gradient_{index}" for index in range(len(spec.formulas))]
    constants = [f"{name}: tl.constexpr" for name in _TILE]
    return [*stored, *thin, *vectors, *results, "rows", "columns", "y_row", "d_y_row", "d_y_column", *constants]


def _positions(body: Block, *, grouped: bool) -> None:
    """Say which rows m and columns n a program computes."""
    if grouped:
        # GROUP tiles of rows run side by side, so that they find their slice of the weight in L2.
        body.line("tiles_n = tl.cdiv(columns, BLOCK_N)")
        body.line("group = tl.program_id(0) // (GROUP * tiles_n)")
        body.line("height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP, GROUP)")
        body.line("tile_m = group * GROUP + tl.program_id(0) % (GROUP * tiles_n) % height")
        body.line("tile_n = tl.program_id(0) % (GROUP * tiles_n) // height")
    else:
        body.line("tile_m, tile_n = tl.program_id(0), tl.program_id(1)")
    body.line("m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)")
    body.line("n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)")
    body.line("k = tl.arange(0, BLOCK_K)")


def _loop(body: Block, source: int, terms: Sequence[Term], accumulators: dict[str, str]) -> None:
    """Add up the terms that read one x, which is loaded once for all of them.

    What is left of the depth behind the last whole tile comes apart: a mask along it would keep every load of the loop
    from being a vector, and with that from being asynchronous.
    """
    body.line(f"whole = depth_{source} // BLOCK_K * BLOCK_K")
    body.line("for start in range(0, whole, BLOCK_K):")
    _add_tiles(body, source, terms, accumulators, masked=False)
    body.line(f"if whole < depth_{source}:")
    body.line("start = whole", 2)
    _add_tiles(body, source, terms, accumulators, masked=True)


def _add_tiles(body: Block, source: int, terms: Sequence[Term], accumulators: dict[str, str], *, masked: bool) -> None:
    along_row, along_column = (" & deep[None, :]", " & deep[:, None]") if masked else ("", "")
    body.line("position = start + k", 2)
    if masked:
        body.line(f"deep = position < depth_{source}", 2)
    body.line(f"x_at = m.to(tl.int64)[:, None] * x_{source}_row + position[None, :] * x_{source}_col", 2)
    body.line(f"left = tl.load(x_{source} + x_at, mask=(m[:, None] < rows){along_row}, other=0.0)", 2)
    for term in terms:
        name, total = term.name, accumulators[term.name]
        if term.packed is not None:
            along_depth = term.gather == "rows"
            for line in packed_tiles.tile_lines(name, source, term.packed, along_depth=along_depth, masked=masked):
                body.line(line, 2)
        else:
            column = "position"
            if term.gather == "depth":
                column = f"tl.load(channels_{name} + position{', mask=deep, other=0' if masked else ''})"
            row = f"w_rows_{name}[None, :] * w_{name}_row"
            body.line(f"w_at = {row} + {column}.to(tl.int64)[:, None] * w_{name}_col", 2)
            body.line(f"right = tl.load(w_{name} + w_at, mask=(n[None, :] < columns){along_column}, other=0.0)", 2)
        body.line("if INTERPRETED:", 2)
        # The interpreter multiplies the bits of bf16 numbers as integers.
        wide = "left.to(tl.float32), right.to(left.dtype).to(tl.float32)"
        body.line(f"{total} = tl.dot({wide}, {total}, input_precision=PRECISION)", 3)
        body.line("else:", 2)
        body.line(f"{total} = tl.dot(left, right.to(left.dtype), {total}, input_precision=PRECISION)", 3)


def _sums_all(formula: Formula, spec: ProductSpec) -> bool:
    """Tell whether all terms enter the formula by their sum alone."""
    if spec.saves or len(spec.terms) < 2:
        return False
    return all(formula.derivative(term.name).expression == 1 for term in spec.terms)


def _store(body: Block, results: dict[str, Formula]) -> None:
    """Compute formulas with their common subexpressions shared, and store them."""
    for pointer, value in zip(results, shared_terms(body, list(results.values())), strict=True):
        body.line(f"result = {printed(value)}")
        if not value.free_symbols:
            body.line("result = tl.full((BLOCK_M, BLOCK_N), result, tl.float32)")
        body.line(f"tl.store({pointer} + at, result.to({pointer}.dtype.element_ty), mask=inside)")
