"""Input that is empty, extreme, broken or not what was asked for: the right numbers, or one clear message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import frozen, lora
from models import DecoderConfig, Fp64Decoder, Kept, batch, fp64_decoder, gradients, masked_sites
from oracle import assert_same_step, kept_from, oracle_step, sparse_step, told, train_step
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sparse_compile.training.session import session_for

pytestmark = pytest.mark.usefixtures("eager_inductor")

SITES = {"layers.0.mlp": 0.75, "layers.0.self_attn": 0.5}


def compiled(model: Any, dynamic: bool | None = False, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", dynamic=dynamic, options=options)


# --- Batches ----------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, call: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Loss, logits and gradients."""
    loss, logits = call(**inputs)
    loss.backward()
    return [loss.detach(), logits.detach(), *gradients(model).values()]


@pytest.mark.parametrize(
    ("rows", "length", "prompts"),
    [
        pytest.param(2, 7, [0, 0], id="no context token"),
        pytest.param(2, 7, [7, 7], id="no output token"),
        pytest.param(2, 7, [7, 3], id="a row without output"),
        pytest.param(1, 9, [4], id="batch of one"),
        pytest.param(3, 1, [0, 0, 0], id="sequence of one"),
        pytest.param(1, 1, [1], id="one context token"),
        pytest.param(2, 2, [1, 1], id="two tokens"),
    ],
)
def test_extreme_batches_equal_the_oracle(
    rows: int, length: int, prompts: list[int], request: pytest.FixtureRequest
) -> None:
    if 1 in (rows, length):
        # AOTAutograd knows the sizes of a batch, which at one are special, and not how many tokens have which role.
        request.getfixturevalue("aot_eager_inductor")
    model = fp64_decoder(layers=2)
    inputs = batch(61, rows=rows, length=length, prompts=prompts)
    with record_channels() as record, told() as messages:
        actual = outputs(model, compiled(model, layer_sparsity=SITES, strict=True, keep_logits=True), inputs)
    assert messages == []
    kept = kept_from({name: choices[0] for name, choices in record.items()})
    assert kept.keys() == SITES.keys()
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        expected = outputs(model, model, inputs)
    # A mean over no target at all is NaN, in the eager model too.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_one_channel_is_kept_where_no_more_is_asked_for() -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    step, kept = sparse_step(model, compiled(model, layer_sparsity=dict.fromkeys(SITES, 0.9999)), inputs)
    assert [len(kept["layers.0.mlp"]), *map(len, kept["layers.0.self_attn"])] == [1, 1, 1]
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_leaves_its_site_dense(value: float) -> None:
    # A clamp turns the infinity into a finite number, so that the dense loss is finite; nothing before it is trained.
    model = fp64_decoder(layers=3, gated=False, region=F.hardtanh, adapters=("down_proj",))
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 5] = value
    inputs = batch(61)
    call = compiled(model, layer_sparsity={"layers.0.mlp": 0.5, "layers.1.mlp": 0.5})
    with told() as messages:
        step, kept = sparse_step(model, call, inputs)
        sparse_step(model, call, inputs)
    assert list(kept) == ["layers.1.mlp"]
    assert len(messages) == 1
    assert "layers.0.mlp" in messages[0] and "not finite" in messages[0] and "layers.1" not in messages[0]
    expected = oracle_step(model, kept, inputs)
    assert bool(expected.loss.isfinite()) == (value == float("inf"))
    if expected.loss.isfinite():
        assert_same_step(step, expected, torch.float64)
    else:
        assert step.loss.isnan()


def test_tied_embeddings() -> None:
    model = fp64_decoder(layers=2, tied=True)
    inputs = batch(61)
    step, kept = sparse_step(model, compiled(model, layer_sparsity=SITES), inputs)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


def test_layers_that_share_their_frozen_weights() -> None:
    """One frozen weight in two blocks, with adapters of their own: one name, two sites, two choices of channels."""
    model = fp64_decoder(layers=3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        first, second = (layer.mlp.get_submodule(name) for layer in model.layers[:2])
        second.base_layer.weight = first.base_layer.weight
    inputs = batch(61)
    with record_channels() as record:
        step = train_step(model, compiled(model, layer_sparsity={"layers.0.mlp": 0.5}, strict=True), inputs)
    ((name, choices),) = record.items()
    assert name == "layers.0.mlp"
    assert len(choices) == 2
    kept: Kept = {f"layers.{i}.mlp": channels for i, channels in enumerate(choices)}
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


def test_a_frozen_model_without_adapter_runs_dense_with_one_warning() -> None:
    model = fp64_decoder(layers=2, adapters=())
    inputs = batch(61)
    call = compiled(model, layer_sparsity=SITES)
    with told() as messages:
        loss = call(**inputs)[0]
        call(**batch(61, length=11))
    torch.testing.assert_close(loss, model(**inputs)[0], rtol=1e-12, atol=0)
    assert len(messages) == 1
    assert "no parameter of this model is trained" in messages[0]


# --- Names ------------------------------------------------------------------------------------------------------------


def test_names_that_match_nothing_give_one_warning_that_lists_the_sites() -> None:
    model = fp64_decoder(layers=2)
    call = compiled(model, layer_sparsity={"layers.0.mlp": 0.5, "h.3.mlp": 0.5, "ayers.0.mlp": 0.5})
    with told() as messages:
        for length in (8, 11):
            _, kept = sparse_step(model, call, batch(61, length=length))
    assert list(kept) == ["layers.0.mlp"]
    assert len(messages) == 1
    assert all(name in messages[0] for name in ("h.3.mlp", "ayers.0.mlp", "layers.0.mlp", "layers.0.self_attn"))


@pytest.mark.parametrize("others", [{}, {"layers.0.mlp": 0.0}], ids=["alone", "beside a dense one"])
def test_where_every_name_matches_nothing_one_warning_says_all(others: dict[str, float]) -> None:
    call = compiled(fp64_decoder(layers=1), layer_sparsity={"h.3.mlp": 0.5, **others})
    with told() as messages:
        for _ in range(2):
            call(**batch(61))[0].backward()
    assert len(messages) == 1 and "no site of this model matches h.3.mlp. Sites there are: " in messages[0]


def test_why_no_site_is_there_is_said_beside_the_names() -> None:
    """The warning of names does not know why there is no site: here the graph has no roles and a layer, no block."""
    call = compiled(frozen(lora(8, 4)), layer_sparsity={"mlp": 0.5})
    with told() as messages:
        for _ in range(2):  # a graph without labels may be a part of a step: the second forward settles it
            call(torch.randn(2, 3, 8, dtype=torch.float64)).sum().backward()
    assert len(messages) == 2
    assert any("no site of this model matches mlp" in text for text in messages)
    assert any("no site became sparse" in text and "Found: 1 frozen linear layers" in text for text in messages)


def test_names_that_match_nothing_raise_when_strict() -> None:
    model = fp64_decoder(layers=2)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"h\.3\.mlp.*layers\.0\.mlp") as raised:
        compiled(model, layer_sparsity={"h.3.mlp": 0.5}, strict=True)(**batch(61))
    assert isinstance(raised.value.inner_exception, ValueError)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presett": "o1"}, "presett.*did you mean 'preset'"),
        ({"preset": "o3"}, "preset must be one of.*'o3'"),
        ({"preset": None}, "preset must be"),
        ({"layer_sparsity": {"layers.0.mlp": 1.0}}, r"layers\.0\.mlp.*\[0, 1\).*1\.0"),
        ({"layer_sparsity": {"layers.0.mlp": -0.1}}, r"\[0, 1\)"),
        ({"layer_sparsity": {"layers.0.mlp": float("nan")}}, r"\[0, 1\)"),
        ({"layer_sparsity": {"layers.0.mlp": "high"}}, "must be a number"),
        ({"layer_sparsity": {"layers..mlp": 0.5}}, "not a dotted site name"),
        ({"layer_sparsity": 0.5}, "must map site names"),
        ({"predictor_rank": 0}, "predictor_rank must be at least 1"),
        ({"predictor_rank": 8.5}, "predictor_rank must be an integer"),
        ({"predictor_path": 3}, "predictor_path must be a path"),
        ({"predictor_tokens": "some"}, "predictor_tokens must be"),
        ({"predictor_tokens": 0}, "predictor_tokens"),
        ({"start_step": 1.5}, "start_step"),
        ({"start_step": -1}, "start_step"),
        ({"end_step": "never"}, "end_step"),
        ({"start_step": 5, "end_step": 3}, "end_step 3 lies before start_step 5"),
        ({"schedule": 100}, "schedule must be a Schedule"),
        ({"keep_logits": 1}, "keep_logits must be True or False"),
        ({"disable": ["fuse_everything"]}, "unknown pass 'fuse_everything'"),
        ({"disable": "find_ffn"}, "disable must be a collection"),
        ({"strict": "yes"}, "strict must be True or False"),
        ({"dump_dir": ""}, "dump_dir must be a path"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"ignore_index": None}, "ignore_index must be an integer"),
        ({"token_selection": "none"}, "token_selection must be one of"),
        ({"channel_selection": "best"}, "channel_selection must be one of"),
        ({"inductor": {"max_autotun": True}}, "unknown inductor option 'max_autotun'.*did you mean"),
        ({"inductor": True}, "inductor must be a dict"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_invalid_option_is_a_value_error_when_compiling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as raised:
        compiled(lambda x: x * 2, **options)(torch.ones(2))
    assert isinstance(raised.value.inner_exception, ValueError)


def test_factors_that_are_not_there_are_a_value_error(tmp_path: Any) -> None:
    model = fp64_decoder(layers=2)
    path = str(tmp_path / "nowhere")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="nowhere") as raised:
        compiled(model, layer_sparsity=SITES, predictor_path=path)(**batch(61))
    assert isinstance(raised.value.inner_exception, ValueError)


# --- Nothing to match -------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """A language model without any block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 61)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.table(input_ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1)), logits


@pytest.mark.parametrize("options", [{}, {"preset": "o2"}], ids=str)
def test_a_graph_without_a_site_gives_one_warning(options: dict[str, Any]) -> None:
    model = Bigram()
    call = compiled(model, **options)
    with told() as messages:
        step = train_step(model, call, batch(61))
        train_step(model, call, batch(61, length=11))
    assert_same_step(step, train_step(model, model, batch(61)), torch.float32)
    assert len(messages) == 1
    for part in ("Looked for: feed-forward and attention blocks", "Found: 0 frozen linear layers", "Declined:"):
        assert part in messages[0]


@pytest.mark.parametrize("preset", ["none", "exact"])
def test_where_no_sparsity_was_asked_for_nothing_is_said(preset: str) -> None:
    model = Bigram()
    with told() as messages:
        train_step(model, compiled(model, preset=preset), batch(61))
    assert messages == []


def test_labels_that_are_absent_leave_the_model_dense_with_one_warning() -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    call = compiled(model, layer_sparsity=SITES)
    with told() as messages:
        for _ in range(3):
            loss = call(input_ids=inputs["input_ids"])[1].square().mean()
            loss.backward()
    actual = gradients(model)
    for _ in range(3):
        model(input_ids=inputs["input_ids"])[1].square().mean().backward()
    torch.testing.assert_close(actual, gradients(model), rtol=1e-9, atol=1e-12)
    assert len(messages) == 1, messages
    assert "cross-entropy" in messages[0] or "output tokens" in messages[0]


def test_a_trained_layer_declines_its_site_alone() -> None:
    model = Fp64Decoder(DecoderConfig(layers=2))
    model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    inputs = batch(61)
    step, kept = sparse_step(model, compiled(model, layer_sparsity={"layers.0.self_attn": 0.5}), inputs)
    assert list(kept) == ["layers.0.self_attn"]
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)
    names = {site.name for site in session_for([p for p in model.parameters() if p.requires_grad]).reports[-1].sites}
    assert "layers.0.self_attn" in names and "layers.0.mlp" not in names
