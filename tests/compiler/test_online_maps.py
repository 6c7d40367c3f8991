"""Maps that a run fits to its own dense steps: when steps are sparse, what maps are, and that nothing is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decoder
from mapped import mapped_sites, mapped_step, random_recipe
from models import DecoderConfig, Fp64Decoder, batch, fp64_decoder
from oracle import assert_same_step, told, train_step
from sparse_compile import Recipe, calibrate, explain
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import output_mask_from_labels
from sparse_compile.surrogates.online import OnlineMap
from sparse_compile.training.schedule import DENSE, SPARSE
from sparse_compile.training.session import Session, session_for
from sweeps import slow

pytestmark = pytest.mark.usefixtures("eager_inductor", "maps_pay")

VOCAB = DecoderConfig().vocab
MAPPED = ("layers.1.mlp",)
"""The sites of three blocks that preset `auto` maps: not the first, and of the last only rows of the loss are left."""


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


class Run:
    """A model that trains under preset `auto`."""

    def __init__(self, model: nn.Module | None = None, dynamic: bool | None = False, **options: Any) -> None:
        self.model = fp64_decoder() if model is None else model
        options = {"preset": "auto", "start_step": 4, "dense_every": 4, "strict": True, **options}
        self.call = torch.compile(self.model, backend="sparselora", dynamic=dynamic, options=options)
        self.optimizer = torch.optim.SGD(trained(self.model), lr=0.05)
        self.step = 0

    @property
    def session(self) -> Session:
        return session_for(trained(self.model))

    def train(self, steps: int, **sizes: int) -> list[str]:
        """Take some steps; return the phase of each."""
        phases = []
        for _ in range(steps):
            self.call(**batch(VOCAB, rows=8, seed=self.step, **sizes))[0].backward()
            phases.append(self.session.phase)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return phases

    def recipe(self) -> Recipe:
        """Return the maps as they are now."""
        maps = {name.partition("@")[0]: each.surrogate for name, each in self.session.online_maps.items()}
        return Recipe({name: SiteRecipe(each) for name, each in maps.items()})


def test_steps_are_dense_until_the_schedule_and_the_maps_are_ready_and_then_each_fourth(eager_inductor: Any) -> None:
    run = Run()
    assert run.train(13) == [DENSE] * 4 + [SPARSE, SPARSE, SPARSE, DENSE] * 2 + [SPARSE]
    assert tuple(run.recipe().sites) == MAPPED
    assert len(eager_inductor.graphs) == 1, "fitting and refitting compile nothing"


def test_each_refit_is_logged_with_the_errors_of_the_maps_before_it(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    with caplog.at_level("INFO", logger="sparse_compile.compiler.map_watch"):
        run.train(9)
    (online,) = run.session.online_maps.values()
    (line,) = [each.getMessage() for each in caplog.records if "fitted anew" in each.getMessage()]
    assert line.startswith(f"sparselora: step 8: maps had errors {online.error:.2f} to {online.error:.2f} of a")
    assert run.session.renewals == 1, "the first fit renews nothing"


def test_without_a_dense_start_steps_are_dense_until_there_are_tokens_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sparse_compile.compiler.map_watch.say", said.append)
    run = Run(start_step=0)
    phases = run.train(12)
    first = phases.index(SPARSE)
    assert [line.split()[0] for line in said] == ["steps", "1"], (
        "once that they stay dense, and then that maps were fitted"
    )
    assert first >= 4 and phases[:first] == [DENSE] * first, "one batch of four is held out"


def test_a_sparse_step_is_that_of_the_oracle_with_the_maps_as_they_are() -> None:
    run = Run()
    run.train(5)
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = mapped_step(run.model, run.recipe(), inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)


def test_a_dense_step_in_between_is_dense() -> None:
    run = Run()
    run.train(7)
    assert run.session.phase == DENSE
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = train_step(run.model, run.model, inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)


def test_maps_are_fitted_to_what_the_block_reads_and_returns_of_context_tokens() -> None:
    """Each dense step hands on what hooks see, adapters as they are in that step, padding left out."""
    run = Run()
    seen: list[tuple[Tensor, Tensor]] = []
    (online,) = _online_of(run)
    collect = online.collect
    online.collect = lambda x, y: (seen.append((x.clone(), y.clone())), collect(x, y))  # type: ignore[method-assign]
    for seed in range(3):
        inputs = batch(VOCAB, rows=4, seed=seed, padding="right")
        context = ~output_mask_from_labels(inputs["labels"]) & inputs["attention_mask"].bool()
        expected = _read_and_returned(run.model.layers[1].mlp, run.model, inputs)
        run.call(**inputs)[0].backward()
        for actual, dense in zip(seen[-1], expected, strict=True):
            torch.testing.assert_close(actual, dense[context])
        run.optimizer.step()


def _read_and_returned(block: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return what a block reads and returns in an eager forward."""
    found: list[Tensor] = []
    handles = [
        block.gate_proj.register_forward_pre_hook(lambda _, args: found.append(args[0])),
        block.down_proj.register_forward_hook(lambda *given: found.append(given[2])),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def _online_of(run: Run) -> list[Any]:
    """Compile for batches with padding, and return the maps that there are then."""
    run.call(**batch(VOCAB, rows=4, padding="right"))[0].backward()
    run.optimizer.zero_grad()
    return list(run.session.online_maps.values())


def test_a_graph_for_other_sizes_reads_the_same_maps(eager_inductor: Any) -> None:
    run = Run(dynamic=None)
    run.train(6)
    before = {name: each.surrogate.q.data_ptr() for name, each in run.session.online_maps.items()}
    phases = run.train(2, length=23)
    assert len(eager_inductor.graphs) == 2 and phases == [SPARSE, DENSE]
    assert {name: each.surrogate.q.data_ptr() for name, each in run.session.online_maps.items()} == before
    inputs = batch(VOCAB, rows=8, seed=99, length=23)
    actual = train_step(run.model, run.call, inputs)
    assert_same_step(actual, mapped_step(run.model, run.recipe(), inputs), torch.float64)


def test_frozen_weights_that_change_keep_steps_dense_until_maps_are_fitted_to_the_new_ones() -> None:
    run = Run()
    assert run.train(6)[-1] == SPARSE
    with torch.no_grad():
        run.model.layers[1].mlp.down_proj.base_layer.weight.mul_(1.5)
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = train_step(run.model, run.model, inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)
    phases = run.train(8)
    assert phases[0] == DENSE and SPARSE in phases


def change(weight: Tensor) -> None:
    """Write other values to a frozen weight, unseen by any graph so far."""
    with torch.no_grad():
        weight.mul_(1.5)


@pytest.mark.parametrize("replaced", [False, True], ids=["written", "replaced"])
def test_a_graph_that_is_compiled_after_weights_changed_does_not_take_the_maps_of_the_old_ones(replaced: bool) -> None:
    run = Run(dynamic=False)
    assert run.train(5)[-1] == SPARSE
    layer = run.model.layers[1].mlp.down_proj.base_layer
    if replaced:
        layer.weight = nn.Parameter(1.5 * layer.weight.detach(), requires_grad=False)
    else:
        change(layer.weight)
    inputs = batch(VOCAB, rows=8, seed=99, length=21)
    expected = train_step(run.model, run.model, inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)


def test_a_change_that_one_graph_has_seen_is_no_news_to_another() -> None:
    """Graphs of fixed sizes are for one phase each: the dense one sees it, and the sparse one runs steps later."""
    run = Run(token_capacity=96)
    assert run.train(7)[-1] == SPARSE and run.session.phase == DENSE
    change(run.model.layers[1].mlp.down_proj.base_layer.weight)
    phases = run.train(12)
    assert phases[0] == DENSE and SPARSE in phases


@pytest.mark.parametrize("dense_every", [4, None])
def test_weights_that_changed_in_the_run_are_no_error_when_another_graph_is_compiled(dense_every: int | None) -> None:
    model = fp64_decoder()
    batches = [batch(VOCAB, rows=8, seed=i) for i in range(4)]
    found = calibrate(model, batches, loss_budget=100.0, config={"context_exit": 1}, progress=False).recipe
    recipe = found.without(*(name for name in found.sites if name not in MAPPED)).with_schedule()
    assert recipe.sites[MAPPED[0]].weights
    run = Run(model, dynamic=False, preset="none", recipe=recipe, start_step=0, dense_every=dense_every, strict=False)
    run.train(2)
    change(model.layers[1].mlp.up_proj.base_layer.weight)
    with told():
        run.train(2)
        inputs = batch(VOCAB, rows=8, seed=99, length=21)
        expected = train_step(model, model, inputs)
        assert_same_step(train_step(model, run.call, inputs), expected, torch.float64)


def test_other_options_do_not_wait_for_what_those_before_waited_for() -> None:
    model = fp64_decoder()
    run = Run(model, preset="none", recipe=recipe_of(model), start_step=0, dense_every=None)
    run.train(1)
    change(model.layers[1].mlp.up_proj.base_layer.weight)
    with told():
        assert run.train(1) == [DENSE]
    torch.compiler.reset()
    other = random_recipe(model.config.hidden, {MAPPED[0]: 5})
    again = Run(model, preset="none", recipe=other, start_step=0, dense_every=None)
    assert again.train(2) == [SPARSE, SPARSE], "the remedy that the warning names"


@pytest.mark.slow
def test_maps_are_not_written_between_two_forwards_of_a_step() -> None:
    run = Run(dynamic=False, start_step=0)
    for seed in range(5):
        loss = run.call(**batch(VOCAB, rows=8, seed=seed))[0]
        # Another graph is compiled here.
        (loss + run.call(**batch(VOCAB, rows=8, seed=seed, length=19 + seed))[0]).backward()
        assert run.session.phase == DENSE
    run.optimizer.step()
    assert run.session.phase == SPARSE


def test_a_recipe_of_constants_is_used_from_the_first_step_on() -> None:
    model = fp64_decoder()
    width = model.config.hidden
    constant = AffineMap(torch.zeros(0, width), torch.zeros(width, 0), torch.ones(width))
    run = Run(model, preset="none", recipe=Recipe({MAPPED[0]: SiteRecipe(constant)}), start_step=0)
    assert run.train(9) == [SPARSE, SPARSE, SPARSE, DENSE] * 2 + [SPARSE]


def recipe_of(model: Fp64Decoder) -> Recipe:
    return random_recipe(model.config.hidden, {"layers.1.mlp": 4})


def test_weights_that_change_under_a_fixed_recipe_leave_training_dense_with_one_warning() -> None:
    model = fp64_decoder()
    run = Run(model, preset="none", recipe=recipe_of(model), start_step=0, dense_every=None)
    assert run.train(2) == [SPARSE, SPARSE]
    with torch.no_grad():
        model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = train_step(model, model, inputs)
    with told() as messages:
        assert_same_step(train_step(model, run.call, inputs), expected, torch.float64)
        assert run.train(3) == [DENSE] * 3
    assert len(messages) == 1 and "the recipe's maps are of the old ones" in messages[0]


def test_a_recipes_maps_are_fitted_anew_where_dense_steps_are_asked_for() -> None:
    model = fp64_decoder()
    recipe = recipe_of(model)
    run = Run(model, preset="none", recipe=recipe, start_step=0)
    assert run.train(1) == [SPARSE], "it begins with the recipe's maps"
    run.train(24)
    ((_, now),) = run.recipe().sites.items()
    given = recipe.sites["layers.1.mlp"].surrogate
    assert now.surrogate is not None and given is not None
    assert not torch.equal(now.surrogate.q, given.q), "in the run they were fitted"
    assert mapped_sites(model, recipe)[0].q is not now.surrogate.q


@pytest.mark.parametrize("option", [slow({"token_bucket": 16}), {"token_capacity": 96}], ids=str)
def test_graphs_of_fixed_sizes(option: dict[str, int]) -> None:
    run = Run(**option)
    assert run.train(9) == [DENSE] * 4 + [SPARSE, SPARSE, SPARSE, DENSE, SPARSE]
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = mapped_step(run.model, run.recipe(), inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)


def test_a_graph_of_fixed_sizes_has_room_for_a_dense_step_where_maps_are_not_fitted_yet() -> None:
    run = Run(start_step=0, token_capacity=96)
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = train_step(run.model, run.model, inputs)
    assert_same_step(train_step(run.model, run.call, inputs), expected, torch.float64)
    assert run.train(5)[-1] == SPARSE


def test_activations_that_are_not_finite_fit_nothing_and_are_told_of_once() -> None:
    model = fp64_decoder()
    run = Run(model, strict=False)
    with torch.no_grad():
        trained(model)[0].fill_(float("nan"))
    with told() as messages:
        assert run.train(7) == [DENSE] * 7
    assert len([text for text in messages if "NaN or infinity" in text]) == 1


def test_batches_without_context_leave_the_run_dense() -> None:
    run = Run()
    inputs = batch(VOCAB, rows=8)
    inputs["labels"] = inputs["input_ids"]
    for _ in range(6):
        run.call(**inputs)[0].backward()
        run.optimizer.step()
    assert run.session.phase == DENSE


class CheckpointedLayer(decoder.DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return checkpoint(super().forward, x, cos, sin, mask, use_reentrant=False)


@pytest.mark.slow
def test_a_block_that_is_computed_again_hands_its_rows_on_once(
    monkeypatch: pytest.MonkeyPatch, aot_eager_inductor: Any
) -> None:
    plain = Run()
    plain.train(3)
    monkeypatch.setattr(decoder, "DecoderLayer", CheckpointedLayer)
    run = Run()
    run.train(3)
    tokens = [each.tokens for each in (*plain.session.online_maps.values(), *run.session.online_maps.values())]
    assert len(tokens) == 2 and tokens[0] == tokens[1] > 0
    assert run.train(3)[-1] == SPARSE
    inputs = batch(VOCAB, rows=8, seed=99)
    actual = train_step(run.model, run.call, inputs)
    assert_same_step(actual, mapped_step(run.model, run.recipe(), inputs), torch.float64)


def test_a_block_whose_map_does_not_pay_stays_dense_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    report = explain(fp64_decoder(), config={"preset": "auto"}, **batch(VOCAB))
    assert not any(site.sparsity for site in report.sites)
    (site,) = (site for site in report.sites if site.name == "layers.1.mlp")
    assert "saves" in site.reason


def test_explain_shows_the_maps_that_a_run_would_fit() -> None:
    report = explain(fp64_decoder(), config={"preset": "auto"}, **batch(VOCAB))
    found = {site.name: (site.sparsity, site.kept, site.provider) for site in report.sites if site.sparsity}
    assert found == {"layers.1.mlp": (1.0, 0, "map of rank 8")}
    assert report.flops_after < report.flops_before


def test_tokens_that_give_no_map_leave_the_one_before_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.train(5)
    before = run.recipe().digest

    def failing(self: OnlineMap) -> None:
        raise torch.linalg.LinAlgError("the iteration did not converge")

    monkeypatch.setattr(OnlineMap, "fit", failing)
    with told() as messages:
        phases = run.train(8)
    assert phases.count(SPARSE) == 6 and run.recipe().digest == before
    assert len(messages) == 1 and "did not converge" in messages[0] and "stays in use" in messages[0]


def test_no_tokens_are_taken_once_no_step_will_be_sparse() -> None:
    run = Run(end_step=6)
    assert run.train(6) == [DENSE] * 4 + [SPARSE] * 2
    ((_, online),) = run.session.online_maps.items()
    tokens = online.tokens
    assert run.train(3) == [DENSE] * 3 and online.tokens == tokens
