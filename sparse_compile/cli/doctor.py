"""`sparselora doctor`: whether all that the backend needs is here, and right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from tabulate import tabulate

from sparse_compile.cli.errors import one_line
from sparse_compile.cli.machine import Check, checks
from sparse_compile.cli.output import Output
from sparse_compile.cli.self_test import Trial, self_test

__all__ = ["run_doctor"]


def run_doctor(output: Output) -> bool:
    """Look at the machine, train a tiny model on it, and write what was found, as text for an issue.

    Returns:
        Whether nothing is wrong.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    found = list(checks(device))
    output.note("a tiny model is trained in every way that this machine has; compiling it takes about half a minute")
    trials = self_test(device)
    looked_at: list[Check | Trial] = [*found, *trials]
    faults = [f"{each.name}: {one_line(each.fault)}" for each in looked_at if each.fault]
    output.result(
        {
            "healthy": not faults,
            "checks": [asdict(each) for each in found],
            "self_test": [asdict(each) for each in trials],
            "faults": faults,
        },
        lambda: _text(found, trials, faults),
    )
    return not faults


def _text(found: Sequence[Check], trials: Sequence[Trial], faults: Sequence[str]) -> str:
    rows = [
        ("self-test", "by", "seconds", "error against eager", ""),
        *(
            (
                each.name,
                each.providers or "-",
                f"{each.seconds:.1f}",
                "-" if each.error is None else f"{each.error:.1e}",
                "FAULT" if each.fault else "ok",
            )
            for each in trials
        ),
    ]
    lines = [
        tabulate([(each.name, each.found, "FAULT" if each.fault else "ok") for each in found], tablefmt="plain"),
        "",
        tabulate(rows, tablefmt="plain", disable_numparse=True),
        "",
        *(f"FAULT {fault}" for fault in faults),
        f"{len(faults)} faults" if faults else "all is well",
    ]
    return "\n".join(lines)
