"""Masked-dense execution, checked by loops, by finite differences and by cases with a known answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models import (
    ALL_TARGETS,
    BATCHES,
    DecoderConfig,
    Fp64Decoder,
    Kept,
    all_kept,
    batch,
    fp64_decoder,
    gradients,
    low_rank_dead_channel_decoder,
    masked_sites,
    normal,
    random_kept,
    random_mask,
    tiny_llama,
    variants,
    with_lora,
)
from sparse_compile.reference import (
    MaskedAttention,
    MaskedFFN,
    ffn_scores,
    low_rank_factors,
    masked_dense,
    output_mask_from_labels,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- Against loops ----------------------------------------------------------------------------------------------------


def conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(linear.out_features, linear.in_features).double()
    module.weight.data = linear.weight.data.T.clone()
    module.bias.data = linear.bias.data.clone()
    return module


@pytest.mark.parametrize("make", [lambda linear: linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("flat", [False, True], ids=["BSC", "NC"])
def test_masked_ffn_by_loop(make: Callable[[nn.Linear], nn.Module], flat: bool) -> None:
    linear = nn.Linear(6, 4, dtype=torch.float64)
    x, output_mask, kept = normal(2, 3, 6), random_mask(2, 3), [1, 4]
    down = make(linear)
    with masked_dense([MaskedFFN(down, torch.tensor(kept))], output_mask):
        y = down(x.flatten(0, 1) if flat else x).view(2, 3, 4)
    for b in range(2):
        for t in range(3):
            read = range(6) if output_mask[b, t] else kept
            close(y[b, t], linear.bias + sum(x[b, t, j] * linear.weight[:, j] for j in read))


@pytest.mark.parametrize("flat", [False, True], ids=["BSC", "NC"])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_masked_attention_by_loop(kv_heads: int, flat: bool) -> None:
    """Every query head alone, in loops: fault 2 of the published code (o_proj gathered with kv indices) cannot hide."""
    heads, d, hidden = 6, 4, 8
    groups = heads // kv_heads
    model = fp64_decoder(layers=1, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=d, bias=True)
    attention = model.layers[0].self_attn
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    x, output_mask = normal(2, 5, hidden), random_mask(2, 5)
    kept_qk, kept_vo = [0, 3, d + 1], [2, d, d + 3]

    def project(layer: nn.Module, row: Tensor, keep: Callable[[int], bool], dense: bool) -> Tensor:
        base = layer.base_layer.weight @ row + layer.base_layer.bias
        base = torch.stack([base[c] if dense or keep(c) else base[c] * 0 for c in range(len(base))])
        return base + layer.scale * layer.lora_B @ (layer.lora_A @ row)

    def of_query(kept: list[int]) -> Callable[[int], bool]:
        return lambda c: c // d // groups * d + c % d in kept

    expected = torch.zeros(2, 5, hidden, dtype=torch.float64)
    for b in range(2):
        tokens = list(zip(x[b], output_mask[b].tolist(), strict=True))
        qs = [project(q, row, of_query(kept_qk), dense) for row, dense in tokens]
        ks = [project(k, row, lambda c: c in kept_qk, dense) for row, dense in tokens]
        vs = [project(v, row, lambda c: c in kept_vo, dense) for row, dense in tokens]
        for t, (_, dense) in enumerate(tokens):
            read = []
            for h in range(heads):
                mine, theirs = slice(h * d, h * d + d), slice(h // groups * d, h // groups * d + d)
                weights = torch.stack([qs[t][mine] @ ks[s][theirs] * d**-0.5 for s in range(t + 1)]).softmax(0)
                read.append(sum(weights[s] * vs[s][theirs] for s in range(t + 1)))
            whole = torch.cat(read)
            kept = torch.tensor([dense or of_query(kept_vo)(c) for c in range(len(whole))])
            expected[b, t] = (
                o.base_layer.weight @ (whole * kept) + o.base_layer.bias + o.scale * o.lora_B @ (o.lora_A @ whole)
            )

    def run() -> Tensor:
        # No rotary embedding: cos 1, sin 0.
        one, zero = torch.ones(1, 1, 5, d, dtype=torch.float64), torch.zeros(1, 1, 5, d, dtype=torch.float64)
        return attention(x, one, zero, None)

    mask = output_mask.flatten() if flat else output_mask
    sites = [MaskedAttention(q, k, v, o, torch.tensor(kept_qk), torch.tensor(kept_vo), d, groups)]
    with masked_dense(sites, mask):
        actual = run()
    close(actual, expected)
    assert not torch.allclose(run(), expected, rtol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_by_its_formula(bias: bool, dropout: float) -> None:
    """Every product with the frozen weight is masked with its bias; branches and the scale of a channel are not."""
    model = with_lora(fp64_decoder(layers=1, adapters=(), bias=bias), ("q_proj", "o_proj"), dora=True, dropout=dropout)
    attention = model.base_model.model.layers[0].self_attn
    q, o, groups, d = attention.q_proj, attention.o_proj, 2, 8
    kept = torch.tensor([0, 3, d + 1])
    x, output_mask = normal(2, 5, 32), random_mask(2, 5)
    keep = torch.zeros(32, dtype=torch.bool)
    keep[[(c // d * groups + g) * d + c % d for c in kept.tolist() for g in range(groups)]] = True
    selected = (output_mask[..., None] | keep).double()

    def formula(layer: nn.Module, masks: tuple[Tensor | float, Tensor | float]) -> Tensor:
        read, written = masks
        w, b = layer.base_layer.weight, layer.base_layer.bias if bias else torch.zeros(32, dtype=torch.float64)
        low_a, low_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        v = layer.lora_magnitude_vector["default"].weight / (w + scale * low_b @ low_a).norm(dim=1)
        torch.manual_seed(0)
        dropped = F.dropout(x, dropout)
        branch = scale * dropped @ low_a.T @ low_b.T
        if not dropout:
            return written * b + v * (written * (read * x @ w.T) + branch)
        return written * (read * x @ w.T + b) + (v - 1) * (written * (read * dropped @ w.T)) + v * branch

    sites = [MaskedAttention(q, attention.k_proj, attention.v_proj, o, kept, kept, d, groups)]
    for layer, masks in ((q, (1.0, selected)), (o, (selected, 1.0))):
        with masked_dense(sites, output_mask):
            torch.manual_seed(0)
            actual = layer(x)
        close(actual, formula(layer, masks))
        torch.manual_seed(0)
        close(layer(x), formula(layer, (1.0, 1.0)))


def test_masking_selects_and_never_multiplies() -> None:
    down = nn.Linear(3, 2)
    x = torch.tensor([[1.0, math.inf, math.nan]], requires_grad=True)
    with masked_dense([MaskedFFN(down, torch.tensor([0]))], torch.tensor([False])):
        y = down(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert torch.equal(x.grad[0, 1:], torch.zeros(2))


# --- Gradients --------------------------------------------------------------------------------------------------------


def loss_of(model: Fp64Decoder, inputs: dict[str, Tensor], kept: Kept) -> Tensor:
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        loss, _ = model(**inputs)
    assert loss is not None
    return loss


def finite_difference_errors(model: Fp64Decoder, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Relative error of each adapter's gradient, A and B together, along one direction."""
    loss().backward()
    taken, parameters, errors = gradients(model), dict(model.named_parameters()), {}
    for adapter in sorted({name.rpartition(".")[0] for name in taken}):
        names = [f"{adapter}.lora_A", f"{adapter}.lora_B"]
        # Half along the gradient, so that the derivative is not small by chance.
        directions = [unit(normal(*taken[name].shape, seed=i)) + unit(taken[name]) for i, name in enumerate(names)]
        ends = []
        with torch.no_grad():
            before = [parameters[name].clone() for name in names]
            for step in (1e-5, -1e-5):
                for name, start, direction in zip(names, before, directions, strict=True):
                    parameters[name].copy_(start + step * direction)
                ends.append(loss().item())
            for name, start in zip(names, before, strict=True):
                parameters[name].copy_(start)
        measured = (ends[0] - ends[1]) / 2e-5
        claimed = sum((taken[name] * direction).sum().item() for name, direction in zip(names, directions, strict=True))
        errors[adapter] = abs(measured - claimed) / abs(measured)
    return errors


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


@pytest.mark.parametrize(
    ("variant", "shape"), [("gqa", "ragged"), ("mha", "left"), ("ungated", "right"), ("eager", "packed")]
)
def test_gradients_are_those_of_the_sparse_function(variant: str, shape: str) -> None:
    """Faults 1 and 8 of the published code: no gradient through the base path, adapters inside a sparse FFN."""
    config = variants(DecoderConfig(layers=2, hidden=12, ffn=16, head_dim=4))[variant]
    model = Fp64Decoder(config)
    inputs = batch(config.vocab, 2, 9, **BATCHES[shape])
    kept = random_kept(config, range(2))
    errors = finite_difference_errors(model, lambda: loss_of(model, inputs, kept))
    assert len(errors) == 2 * (len(ALL_TARGETS) if config.gated else len(ALL_TARGETS) - 1)
    assert max(errors.values()) < 1e-5, errors


@contextmanager
def detached_base_paths(model: Fp64Decoder) -> Iterator[None]:
    """Do as the published code does: compute the base path of q, k, v and o under `no_grad`."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
                handle = module.base_layer.register_forward_hook(lambda module, args, output: output.detach())
                stack.callback(handle.remove)
        yield


def test_finite_differences_expose_a_missing_base_gradient() -> None:
    """The test above can fail: fault 1, planted, changes the gradients below by far more than its bound."""
    config = DecoderConfig(layers=2, hidden=12, ffn=16, head_dim=4)
    model = Fp64Decoder(config)
    inputs = batch(config.vocab, 2, 9)
    kept = random_kept(config, range(2))
    with detached_base_paths(model):
        errors = finite_difference_errors(model, lambda: loss_of(model, inputs, kept))
    below = [error for name, error in errors.items() if name.startswith("layers.0.mlp")]
    assert min(below) > 1e-3


@pytest.mark.parametrize("last_is_output", [True, False])
def test_base_path_of_sparse_attention_passes_gradient(last_is_output: bool) -> None:
    """Fault 1 alone: no adapter at all, and the gradient is that with respect to the block's input."""
    model = fp64_decoder(layers=1, hidden=8, head_dim=4, kv_heads=2, heads=4, adapters=())
    attention = model.layers[0].self_attn
    x = normal(1, 4, 8).requires_grad_()
    one, zero = torch.ones(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    kept = torch.tensor([0, 2, 5, 7])
    site = MaskedAttention(*(getattr(attention, f"{n}_proj") for n in "qkvo"), kept, kept, 4, 2)
    mask = torch.tensor([[False, False, False, last_is_output]])
    with masked_dense([site], mask):
        assert torch.autograd.gradcheck(lambda x: attention(x, one, zero, None), (x,))
        (gradient,) = torch.autograd.grad(attention(x, one, zero, None).square().sum(), x)
    assert (gradient[0, :-1].abs().amax(-1) > 1e-3).all()


def test_adapters_inside_a_sparse_ffn() -> None:
    """Fault 8: gate's and up's adapters act inside the intermediate, and down's adapter reads the masked one."""
    model = fp64_decoder(layers=1, hidden=8, ffn=12)
    mlp, x, output_mask, kept = model.layers[0].mlp, normal(2, 3, 8), random_mask(2, 3), torch.tensor([1, 7, 8])

    def merged(layer: nn.Module) -> Tensor:
        return (layer.base_layer.weight + layer.scale * layer.lora_B @ layer.lora_A).T

    def by_hand() -> Tensor:
        hidden = F.silu(x @ merged(mlp.gate_proj)) * (x @ merged(mlp.up_proj))
        channels = torch.zeros(12, dtype=torch.float64)
        channels[kept] = 1
        return (hidden * (output_mask[..., None].double() + ~output_mask[..., None] * channels)) @ merged(mlp.down_proj)

    with masked_dense([MaskedFFN(mlp.down_proj, kept)], output_mask):
        actual = mlp(x)
    close(actual, by_hand())
    weighting = normal(2, 3, 8, seed=5)
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    for got, expected in zip(
        torch.autograd.grad((actual * weighting).sum(), parameters),
        torch.autograd.grad((by_hand() * weighting).sum(), parameters),
        strict=True,
    ):
        close(got, expected)
        assert expected.abs().max() > 1e-3


# --- Known answers ----------------------------------------------------------------------------------------------------


def loss_and_gradients(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = run()
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("shape", list(BATCHES))
@pytest.mark.parametrize("variant", list(variants()))
def test_keeping_everything_is_bit_equal_to_dense(variant: str, shape: str) -> None:
    config = variants()[variant]
    model = Fp64Decoder(config)
    inputs = batch(config.vocab, **BATCHES[shape])
    dense, dense_gradients = loss_and_gradients(model, lambda: model(**inputs)[0])
    masked, masked_gradients = loss_and_gradients(model, lambda: loss_of(model, inputs, all_kept(config)))
    assert torch.equal(dense, masked)
    for name, gradient in dense_gradients.items():
        assert torch.equal(gradient, masked_gradients[name]), name
        assert gradient.abs().max() > 1e-8, f"{name}: this model tests nothing"


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_llama_with_peft(kv_heads: int) -> None:
    model = with_lora(tiny_llama(kv_heads=kv_heads, bias=True, dtype=torch.float64), ALL_TARGETS)
    inputs = batch(97, padding="left")
    mask = output_mask_from_labels(inputs["labels"])
    geometry = DecoderConfig(layers=3, ffn=96, heads=4, kv_heads=kv_heads, head_dim=16)

    def run(kept: Kept) -> Tensor:
        with masked_dense(masked_sites(model, kept), mask):
            return model(**inputs).loss

    dense, dense_gradients = loss_and_gradients(model, lambda: model(**inputs).loss)
    everything, same_gradients = loss_and_gradients(model, lambda: run(all_kept(geometry)))
    assert torch.equal(dense, everything)
    assert all(torch.equal(dense_gradients[name], same_gradients[name]) for name in dense_gradients)
    sparse, sparse_gradients = loss_and_gradients(model, lambda: run(random_kept(geometry, [1])))
    assert (sparse - dense).abs() > 1e-3
    assert all(gradient.abs().max() > 1e-8 for gradient in sparse_gradients.values())


@pytest.mark.parametrize("variant", ["gqa", "mha", "ungated", "wide_heads"])
def test_dead_channels_cost_nothing_and_are_found(variant: str) -> None:
    config = variants(DecoderConfig(hidden=24, rank=3))[variant]
    model, kept = low_rank_dead_channel_decoder(config)
    inputs = batch(config.vocab, padding="right")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "_proj" in name:
            assert torch.linalg.matrix_rank(module.weight) <= 8, name
    dense, dense_gradients = loss_and_gradients(model, lambda: model(**inputs)[0])
    masked, masked_gradients = loss_and_gradients(model, lambda: loss_of(model, inputs, kept))
    close(masked, dense)
    for name, gradient in dense_gradients.items():
        close(masked_gradients[name], gradient)

    output_mask = output_mask_from_labels(inputs["labels"])
    scored = scored_positions(output_mask, inputs["attention_mask"])
    x = normal(*inputs["input_ids"].shape, config.hidden)
    for i, layer in enumerate(model.layers):
        factors = {
            name: low_rank_factors(module.weight)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        ffn = ffn_scores(x, scored, [factors[f"mlp.{name}.base_layer"] for name in names], config.region)
        ffn_kept, (qk_kept, vo_kept) = kept[f"layers.{i}.mlp"], kept[f"layers.{i}.self_attn"]
        assert torch.equal(top_channels(ffn, len(ffn_kept)), ffn_kept)
        q, k, v = (factors[f"self_attn.{name}_proj.base_layer"] for name in "qkv")
        groups = config.heads // config.kv_heads
        qk = query_key_scores(x, scored, q, k, head_dim=config.head_dim, groups=groups)
        assert torch.equal(top_channels(qk, len(qk_kept)), qk_kept)
        assert torch.equal(top_channels(value_scores(x, scored, v), len(vo_kept)), vo_kept)


@pytest.mark.parametrize("output", [True, False], ids=["all output", "all context"])
def test_extreme_roles(output: bool) -> None:
    config = DecoderConfig()
    model = Fp64Decoder(config)
    inputs = batch(config.vocab)
    mask = torch.full_like(inputs["input_ids"], output, dtype=torch.bool)
    with masked_dense(masked_sites(model, random_kept(config, [1])), mask):
        loss, _ = model(**inputs)
    dense, _ = model(**inputs)
    assert torch.equal(loss, dense) == output


# --- Hooks ------------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_removed_also_after_an_error() -> None:
    config = DecoderConfig()
    model = Fp64Decoder(config)
    inputs = batch(config.vocab)
    before, _ = model(**inputs)
    sites, mask = masked_sites(model, random_kept(config, [0, 1])), output_mask_from_labels(inputs["labels"])
    with masked_dense(sites, mask):
        assert hooks(model) == 2 * 5
        during, _ = model(**inputs)
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="user's own"), masked_dense(sites, mask):
        raise RuntimeError("user's own")
    assert hooks(model) == 0
    broken = MaskedAttention(*[nn.Identity()] * 4, torch.tensor([0]), None, head_dim=4)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), masked_dense([*sites, broken], mask):
        pass
    assert hooks(model) == 0
    after, _ = model(**inputs)
    assert torch.equal(before, after)
    assert not torch.equal(before, during)


def test_wrong_mask_and_wrong_index_are_named() -> None:
    down = nn.Linear(6, 4)
    with (
        pytest.raises(ValueError, match="output_mask has 4 tokens"),
        masked_dense([MaskedFFN(down, torch.tensor([0]))], torch.ones(1, 4, dtype=torch.bool)),
    ):
        down(torch.ones(1, 3, 6))
    with (
        pytest.raises(ValueError, match="from 0 to 6 in a width of 6"),
        masked_dense([MaskedFFN(down, torch.tensor([0, 6]))], torch.ones(1, 3, dtype=torch.bool)),
    ):
        down(torch.ones(1, 3, 6))
