"""Attention blocks and their head geometry are read off the graph, however they are spelt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import Captured, capture, frozen, lora, rejections, run_passes
from models import batch, fp64_decoder, normal, tiny_llama
from sparse_compile.graph.sites import AttentionSite
from sparse_compile.passes.protocol import PassOutcome

PASSES = ("canonicalize_linears", "find_projections", "find_attention")
B, S, HEADS, KV, D, HIDDEN = 2, 5, 4, 2, 6, 10


class Attention(nn.Module):
    """Projections, a function that makes heads of them, and one that attends."""

    def __init__(
        self,
        heads: Callable[[Attention, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
        attend: Callable[..., Tensor] | None = None,
        finish: Callable[..., object] | None = None,
        kv_heads: int = KV,
        head_dim: int = D,
    ):
        super().__init__()
        self.heads, self.attend, self.finish = heads or repeated, attend or sdpa, finish or merged
        self.q, self.k, self.v = (lora(HIDDEN, n * head_dim, bias=True) for n in (HEADS, kv_heads, kv_heads))
        self.o, self.other = lora(HEADS * head_dim, HIDDEN), lora(HEADS * head_dim, HIDDEN)
        self.context, self.fused = lora(HIDDEN, kv_heads * head_dim), lora(HIDDEN, 3 * HEADS * head_dim)
        self.narrow = lora(HEADS * head_dim // 2, HIDDEN)
        self.norm = nn.RMSNorm(head_dim)
        self.latents = nn.Parameter(normal(B, HEADS, S, head_dim))
        self.d = head_dim
        frozen(self)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.d).transpose(1, 2)

    def forward(self, x: Tensor) -> object:
        q, k, v = self.heads(self, x)
        return self.finish(self, self.attend(q, k, v), k)


def merged(m: Attention, a: Tensor, _: Tensor) -> Tensor:
    return m.o(a.transpose(1, 2).reshape(*a.shape[::2][:1], a.shape[2], -1))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * D**-0.5
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return F.dropout(scores.masked_fill(~mask, -1e9).softmax(-1), 0.1) @ v


def eager_added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -1e9, dtype=q.dtype).triu(1)
    weights = torch.softmax(torch.matmul(q, k.mT) / D**0.5 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def repeat(x: Tensor, groups: int = HEADS // KV) -> Tensor:
    rows, heads, length, channels = x.shape
    return x[:, :, None].expand(rows, heads, groups, length, channels).reshape(rows, heads * groups, length, channels)


def repeated(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return m.split(m.q(x)), repeat(m.split(m.k(x))), repeat(m.split(m.v(x)))


def plain(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return m.split(m.q(x)), m.split(m.k(x)), m.split(m.v(x))


def interleaved(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = plain(m, x)
    return q, k.repeat_interleave(HEADS // KV, dim=1), v.repeat_interleave(HEADS // KV, dim=1)


def with_rotary(rotate: Callable[[Tensor], Tensor]) -> Callable[[Attention, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def heads(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(m, x)
        angles = torch.arange(S, dtype=x.dtype)[:, None] * torch.ones(D, dtype=x.dtype)
        q, k = (y * angles.cos() + rotate(y) * angles.sin() for y in (q, k))
        return q, repeat(k), repeat(v)

    return heads


def partial_rotary(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = plain(m, x)
    q, k = (torch.cat((y[..., :4] * 2 + torch.cat((-y[..., 2:4], y[..., :2]), -1), y[..., 4:]), -1) for y in (q, k))
    return q, repeat(k), repeat(v)


def complex_rotary(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = plain(m, x)
    angles = torch.arange(S, dtype=x.dtype)[:, None] * torch.ones(D // 2, dtype=x.dtype)
    table = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * table).flatten(3) for y in (q, k))
    return q, repeat(k), repeat(v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * D**-0.5
    scores = torch.cat((scores, scores.new_zeros(1, HEADS, 1, 1).expand(B, HEADS, S, 1)), dim=-1)
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def heads_of_all_sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.reshape(B * HEADS, S, D) for each in (q, k, v))
    bias = torch.arange(S, dtype=q.dtype).expand(B * HEADS, 1, S)
    scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=D**-0.5)
    return torch.bmm(scores.view(B, HEADS, S, S).softmax(-1).view(B * HEADS, S, S), v).view(B, HEADS, S, D)


def normed_result(m: Attention, a: Tensor, _: Tensor) -> Tensor:
    y = a.transpose(1, 2).reshape(B, S, -1)
    return m.o(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def part_of_each_head(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = repeated(m, x)
    return q, k, v[..., : D // 2]


def normed(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = plain(m, x)
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6)
    return m.norm(q), repeat(k), repeat(v)


ROTARY: dict[str, Callable[[Tensor], Tensor]] = {
    "half slices": lambda y: torch.cat((-y[..., D // 2 :], y[..., : D // 2]), dim=-1),
    "by name": lambda y: torch.cat(tensors=(-y[..., D // 2 :], y[..., : D // 2]), dim=-1),
    "chunk": lambda y: torch.cat((-y.chunk(2, dim=-1)[1], y.chunk(2, dim=-1)[0]), dim=-1),
    "stack and flatten": lambda y: torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2),
}
FOUND: dict[str, Attention] = {
    "expand and reshape": Attention(),
    "repeat_interleave": Attention(interleaved),
    "enable_gqa": Attention(plain, sdpa_gqa),
    "mha": Attention(plain, kv_heads=HEADS),
    "one key/value head": Attention(
        lambda m, x: (m.split(m.q(x)), *(repeat(m.split(p(x)), HEADS) for p in (m.k, m.v))), kv_heads=1
    ),
    "eager": Attention(attend=eager),
    "eager, mask added, softmax in fp32": Attention(attend=eager_added_mask),
    "rotary on a part of each head": Attention(partial_rotary),
    "norm over the head": Attention(normed),
    "rotary, complex numbers": Attention(complex_rotary),
    "attention sinks": Attention(attend=with_sinks),
    "heads of all sequences in one dimension, scores by baddbmm": Attention(attend=heads_of_all_sequences),
    "norm of the merged heads": Attention(finish=normed_result),
    "cache returned": Attention(plain, sdpa_gqa, lambda m, a, k: (merged(m, a, k), k)),
    "heads by permute and flatten": Attention(
        lambda m, x: tuple(p(x).unflatten(-1, (-1, D)).permute(0, 2, 1, 3) for p in (m.q, m.k, m.v)),
        sdpa_gqa,
        lambda m, a, k: m.o(a.permute(0, 2, 1, 3).flatten(2)),
    ),
    "heads by permute, arguments by name": Attention(
        lambda m, x: tuple(p(x).unflatten(-1, (-1, D)).permute(dims=(0, 2, 1, 3)) for p in (m.q, m.k, m.v)),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True),
        lambda m, a, k: m.o(torch.flatten(input=torch.permute(input=a, dims=(0, 2, 1, 3)), start_dim=2)),
    ),
} | {f"rotary, {name}": Attention(with_rotary(rotate)) for name, rotate in ROTARY.items()}


def find(model: nn.Module, *args: Tensor) -> tuple[Captured, PassOutcome]:
    captured = capture(model, *(args or (normal(B, S, HIDDEN),)))
    return captured, run_passes(captured, *PASSES)["find_attention"]


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    captured, outcome = find(FOUND[name])
    assert not outcome.rejections
    (site,) = captured.ctx.facts.attention_sites
    kv_heads = FOUND[name].k.base_layer.out_features // D
    assert (site.kv_heads, site.groups, site.head_dim, site.value_head_dim) == (kv_heads, HEADS // kv_heads, D, D)
    assert [p.name for p in site.projections] == ["q", "k", "v", "o"]
    assert all(len(projection.branches) == 1 for projection in site.projections)
    assert site.channels == kv_heads * D


class Gated(Attention):
    """The query's layer has a gate beside each head; values make a bias of the scores."""

    def forward(self, x: Tensor) -> object:
        q, gate = self.fused(x).view(B, S, HEADS, 2 * D).chunk(2, dim=-1)
        k, v = repeat(self.split(self.k(x))), repeat(self.split(self.v(x)))
        a = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=v.mean(-1)[:, :, None])
        return self.o(a.transpose(1, 2).reshape(B, S, -1) * gate.reshape(B, S, -1).sigmoid())


def test_a_gate_beside_the_query_and_values_that_make_the_mask() -> None:
    model = Gated()
    model.fused = frozen(lora(HIDDEN, 2 * HEADS * D))
    captured, outcome = find(model)
    assert not outcome.rejections
    (site,) = captured.ctx.facts.attention_sites
    assert [(p.name, p.out_features) for p in (site.query, *site.beside)] == [("fused[0]", 24), ("fused[1]", 24)]


def test_head_geometry_is_that_of_loops() -> None:
    """Query head h reads key/value head h // groups: zero a key/value head and see which query heads notice."""
    model = FOUND["repeat_interleave"]
    site: AttentionSite = find(model)[0].ctx.facts.attention_sites[0]
    x = normal(B, S, HIDDEN)
    q, k, v = interleaved(model, x)
    for head in range(KV):
        values = model.split(model.v(x)).clone()
        values[:, head] = 0
        changed = values.repeat_interleave(HEADS // KV, dim=1)
        difference = (sdpa(q, k, changed) - sdpa(q, k, v)).abs().amax((0, 2, 3))
        assert difference.nonzero().flatten().tolist() == [h for h in range(HEADS) if h // site.groups == head]


def cross(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = x.flip(1)
    return m.split(m.q(x)), repeat(m.split(m.k(y))), repeat(m.split(m.v(y)))


def every_third(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = m.fused(x)
    return m.split(y[..., ::3]), m.split(y[..., 1::3]), m.split(y[..., 2::3])


def overlapping(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, width = m.fused(x), HEADS * D
    return m.split(y[..., :width]), m.split(y[..., :width]), m.split(y[..., width : 2 * width])


def fused_with_more(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = m.fused(x).split([2 * D, 2 * D, 2 * D, 6 * D], dim=-1)
    return m.split(q), m.split(k), m.split(v)


def change(**parts: Callable[[Tensor], Tensor]) -> Callable[[Attention, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Do something to the query, key or value heads of a plain attention."""

    def heads(m: Attention, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            parts.get(name, lambda y: y if name == "q" else repeat(y))(y)  # noqa: B023
            for name, y in zip("qkv", plain(m, x), strict=True)
        )

    return heads  # type: ignore[return-value]


def tile(x: Tensor) -> Tensor:
    return x.repeat(1, HEADS // KV, 1, 1)


def channels_first(m: Attention, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p(x).view(B, S, D, -1).permute(0, 3, 1, 2) for p in (m.q, m.k, m.v))


def two_layouts(q: Tensor) -> Tensor:
    return q.view(B, S, -1, D).transpose(1, 2) + q.view(B, S, D, -1).permute(0, 3, 1, 2)


def every_second(m: Attention, a: Tensor, k: Tensor) -> Tensor:
    return merged(m, a[:, ::2], k)


MHA = {"kv_heads": HEADS}
DECLINED: dict[str, tuple[Attention, str]] = {
    "cross-attention": (Attention(cross), "query, key and value read different tensors (cross-attention stays dense)"),
    "fused qkv, every third channel": (Attention(every_third), "whose split into rows cannot be followed"),
    "fused qkv, parts that overlap": (Attention(overlapping), "whose split into rows cannot be followed"),
    "fused qkv, a part is not read": (
        Attention(fused_with_more, finish=lambda m, a, k: m.narrow(a.transpose(1, 2).reshape(B, S, -1))),
        "whose split into rows cannot be followed",
    ),
    "latent queries": (Attention(lambda m, x: (m.latents, *repeated(m, x)[1:])), "comes from 0 frozen projections"),
    "sum of projections": (
        Attention(lambda m, x: (m.split(m.q(x)), repeat(m.split(m.k(x) + m.context(x))), repeat(m.split(m.v(x))))),
        "comes from 2 frozen projections: ",
    ),
    "repeated too little": (
        Attention(
            lambda m, x: (m.split(m.q(x)), repeat(m.split(m.k(x))), repeat(m.split(m.v(x)))), sdpa_gqa, kv_heads=1
        ),
        "4 query heads over 1 key/value heads repeated 2 times",
    ),
    "unequal key and value heads": (
        Attention(lambda m, x: (m.split(m.q(x)), repeat(m.split(m.k(x))), m.split(m.fused(x)[..., : HEADS * D]))),
        "keys and values have different numbers of heads",
    ),
    "repeated queries": (
        Attention(
            lambda m, x: (repeat(m.split(m.q(x))), *(repeat(m.split(p(x)), 4) for p in (m.k, m.v))), finish=every_second
        ),
        "the query heads of q are repeated",
    ),
    "one head, three dimensions": (
        Attention(lambda m, x: (m.q(x), m.k(x), m.v(x)), finish=lambda m, a, k: m.o(a), **MHA),
        "has 3 dimensions, not (batch, heads, tokens, channels)",
    ),
    "attention over channels": (
        Attention(
            lambda m, x: tuple(y.transpose(2, 3) for y in plain(m, x)),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(2, 3),
            **MHA,
        ),
        "is not a head's channels",
    ),
    "tiled heads": (Attention(change(k=tile, v=tile)), "key/value heads are tiled, not repeated in place"),
    "channels before heads": (Attention(channels_first, **MHA), "are not its outer feature dimension"),
    "a result read twice": (Attention(finish=lambda m, a, k: merged(m, a, k) + a.sum()), "is read 2 times"),
    "two output projections": (
        Attention(finish=lambda m, a, k: m.o(h := a.transpose(1, 2).reshape(B, S, -1)) + m.other(h)),
        "2 projections read the attention result",
    ),
    "heads not side by side": (
        Attention(finish=lambda m, a, k: m.o(a.permute(0, 2, 3, 1).reshape(B, S, -1))),
        "o does not read the heads side by side",
    ),
    "tokens and heads mingled": (
        Attention(finish=lambda m, a, k: m.o(a.reshape(B, S, -1))),
        "the view splits a dimension unevenly",
    ),
    "an extra reader": (Attention(finish=lambda m, a, k: merged(m, a, k) + k.sum()), "is also read by sum_1"),
    "a part of each value head": (
        Attention(part_of_each_head, finish=lambda m, a, k: m.narrow(a.transpose(1, 2).reshape(B, S, -1))),
        "v: its heads are 6 wide, those that attention reads 3",
    ),
    # What a layout cannot follow, in the words of head_layout.
    "mixed by a product": (
        Attention(change(q=lambda q: q @ torch.ones(D, D, dtype=q.dtype))),
        "may mix heads or channels",
    ),
    "split unevenly": (Attention(change(q=lambda q: torch.cat(q.split([2, 4], -1)[::-1], -1))), "a head unevenly"),
    "picked by a number": (
        Attention(change(q=lambda q: q[:, 0][:, None].expand(B, HEADS, S, D))),
        "indexes with a number",
    ),
    "part of the heads": (
        Attention(
            change(q=lambda q: q[:, :2], k=lambda k: k, v=lambda v: v),
            finish=lambda m, a, k: m.narrow(a.transpose(1, 2).reshape(B, S, -1)),
        ),
        "takes a part of the tokens",
    ),
    "joined with other heads": (
        Attention(change(q=lambda q: torch.cat((torch.ones(B, 2, S, D, dtype=q.dtype), q[:, 2:]), 1))),
        "takes a part of the tokens",
    ),
    "joined with a prefix": (
        Attention(change(k=lambda k: repeat(torch.cat((torch.zeros(B, KV, 3, D, dtype=k.dtype), k), 2)))),
        "joins the heads with other tensors",
    ),
    "heads joined": (
        Attention(change(k=lambda k: torch.cat((k, k), 1), v=tile)),
        "joins tensors along tokens or heads",
    ),
    "broadcast": (
        Attention(
            lambda m, x: (
                m.split(m.q(x)),
                m.split(m.k(x)) * torch.ones(1, HEADS, 1, 1, dtype=x.dtype),
                m.split(m.v(x)),
            ),
            kv_heads=1,
        ),
        "broadcasts the heads against another tensor",
    ),
    "heads of two layouts": (
        Attention(lambda m, x: (two_layouts(m.q(x)), *repeated(m, x)[1:])),
        "combines tensors whose heads lie differently",
    ),
    "unbound": (Attention(change(q=lambda q: torch.stack(q.unbind(1), 1))), "returns no tensor"),
    "an attribute": (Attention(change(q=lambda q: q.real)), "not a tensor operation"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str) -> None:
    model, reason = DECLINED[name]
    captured, outcome = find(model)
    assert not captured.ctx.facts.attention_sites
    assert len(outcome.rejections) == 1 and reason in rejections(outcome)[0], outcome.rejections


def test_unrelated_graph() -> None:
    captured, outcome = find(frozen(nn.Sequential(nn.Linear(HIDDEN, 4), nn.Softmax(-1), nn.Linear(4, 4))))
    assert not captured.ctx.facts.attention_sites and not outcome.rejections


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama(attention: str) -> None:
    model = tiny_llama(layers=2, attention=attention).requires_grad_(False)
    inputs = batch(97)
    captured = capture(lambda: model(**inputs).loss)
    outcome = run_passes(captured, *PASSES)["find_attention"]
    assert not outcome.rejections
    sites = captured.ctx.facts.attention_sites
    assert [(site.kv_heads, site.groups, site.head_dim) for site in sites] == [(2, 2, 16)] * 2
    assert [site.name.split(".")[-2:] for site in sites] == [["0", "self_attn"], ["1", "self_attn"]]


def test_repeated_dynamic_and_idempotent() -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61, rows=3)
    ids, labels = inputs["input_ids"], inputs["labels"]
    captured = capture(model, ids, labels, dynamic=((ids, 0), (labels, 0)))
    outcome = run_passes(captured, *PASSES)["find_attention"]
    first = captured.ctx.facts.attention_sites
    assert len(first) == 2 and not outcome.rejections
    run_passes(captured, "find_attention")
    assert captured.ctx.facts.attention_sites == first
