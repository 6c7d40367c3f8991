"""What users are told of a model that was compiled: what they asked for and have not, and what their run does."""

from __future__ import annotations

from typing import Any

import pytest

from models import batch, fp64_decoder
from oracle import told
from sparse_compile.compiler.report import SiteReport
from sparse_compile.graph.cost import Gain
from sparse_compile.passes.roles import plan_sparsity
from sparse_compile.training.session import session_for


def pays_for(kinds: tuple[str, ...]) -> Any:
    """Have sites of these kinds pay, and no others."""
    return lambda site, *_: Gain(442_411.0, 442_368.0) if site.kind in kinds else Gain(442_368.0, 442_411.0)


def warnings_of_a_step(options: dict[str, Any]) -> tuple[list[str], list[SiteReport]]:
    """Compile a model, run two steps, and return what was told, and the sites."""
    model = fp64_decoder(layers=4)
    model.compile(backend="sparselora", options=options)
    with told() as messages:
        for _ in range(2):
            model(**batch(61))[0].backward()
    (report,) = session_for([each for each in model.parameters() if each.requires_grad]).reports
    return messages, report.sites


# --- Sites that do not pay --------------------------------------------------------------------------------------------


def test_a_preset_site_that_does_not_pay_is_a_line_of_the_report_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, eager_inductor: Any
) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(("ffn",)))
    messages, sites = warnings_of_a_step({"preset": "o2"})
    assert messages == [] and eager_inductor.sparse[0]
    reasons = {site.reason for site in sites if site.name == "layers.2.self_attn"}
    assert reasons == {"saves 4.4237e+05 FLOPs a token and costs the time of 4.4241e+05"}


def test_where_nothing_pays_the_warning_names_the_reason(monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(()))
    (message,), _ = warnings_of_a_step({"preset": "o2"})
    assert "preset 'o2' asks for sparsity and no site became sparse" in message
    assert "saves 4.4237e+05 FLOPs a token and costs the time of 4.4241e+05" in message
    assert not any(eager_inductor.sparse)


def test_what_else_keeps_a_preset_site_dense_is_a_warning(monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(("ffn", "attention")))
    model = fp64_decoder(layers=4)
    weight = model.layers[1].mlp.up_proj.base_layer.weight
    weight.data[0, 0] = float("nan")
    model.compile(backend="sparselora", options={"preset": "o2"})
    with told() as messages:
        model(**batch(61))
    (message,) = messages
    assert "sites that were asked for stay dense" in message and "is not finite" in message
