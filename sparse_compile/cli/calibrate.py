"""`sparselora calibrate`: a recipe for a model, chosen for a goal."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sparse_compile.calibration.calibrate import Calibration, calibrate
from sparse_compile.calibration.goals import Goal
from sparse_compile.cli.batches import DataChoice, read_batches
from sparse_compile.cli.errors import CommandError, needs
from sparse_compile.cli.models import ModelChoice, load_model, load_tokenizer
from sparse_compile.cli.output import Output

__all__ = ["run_calibrate"]


def run_calibrate(output: Output, model: ModelChoice, data: DataChoice, goal: Goal, out: Path) -> None:
    """Calibrate a model and save the recipe.

    Args:
        output: where what was found goes.
        model: what is loaded.
        data: what is read, at least 2 batches.
        goal: what the recipe is chosen for.
        out: folder of the recipe.

    Raises:
        CommandError: the goal is out of reach: nothing is saved.
    """
    needs("calibrate", ("transformers", "peft"))
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file: name a folder")
    loaded, told = load_model(model)
    output.note(told)
    batches, told = read_batches(data, load_tokenizer(model), next(loaded.parameters()).device, at_least=2)
    output.note(told)
    given: dict[str, Any] = {goal.name: goal.value}
    found = calibrate(loaded, batches, **given)
    if found.reason:
        raise CommandError(f"no recipe is saved, for goal {goal} is not met: {found.reason}")
    found.recipe.save(out)
    output.result(
        {"recipe": str(out), **_data(found)},
        lambda: f"{found}\n\nrecipe: {out}   (option recipe={str(out)!r}, or --recipe {out})",
    )


def _data(found: Calibration) -> dict[str, Any]:
    """Return a calibration as plain data, without the maps."""
    plain = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "recipe"}
    listed = {name: [asdict(each) for each in plain[name]] for name in ("sites", "exits", "curve")}
    return {**plain, **listed, "goal": asdict(found.goal), "declined": dict(found.declined), "speedup": found.speedup}
