"""Compile caches across processes: equal sources hit, and a changed formula is never answered by an old gradient."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.requires_grad_(False)
        self.trained = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids, labels):
        x = F.linear(self.embed(ids), self.trained)
        logits = self.head(self.down(F.relu(self.up(x))).cumsum(1))  # every token reads the ones before it
        return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))

model = Model()
options = {"layer_sparsity": {"up": 0.5}, "strict": True, "start_step": 0}
call = torch.compile(model, backend="sparselora", dynamic=False, fullgraph=True, options=options)
ids = torch.arange(10).reshape(2, 5)
labels = ids.clone()
labels[:, :3] = -100
loss = call(ids, labels)
loss.backward()
import sparse_compile
counters = torch._dynamo.utils.counters
print(json.dumps({
    "root": sparse_compile.__path__[0],
    "loss": loss.item(),
    "gradient": model.trained.grad.norm().item(),
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "bypassed": counters["aot_autograd"]["autograd_cache_bypass"],
}))
"""


def run(package: Path, cache: Path) -> dict[str, Any]:
    """Train one step in a fresh process that imports the package from the folder given."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "SPARSELORA_CACHE_DIR": str(cache / "factors"),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("root") == str(package / "sparse_compile")
    return found


def installed_layout(repo_root: Path, target: Path) -> Path:
    """Copy the package as an installation lays it out."""
    for source, name in (("sparse_compile", "."), ("kernels", "kernels"), ("passes", "passes")):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo_root / source, target / "sparse_compile" / name, ignore=ignore, dirs_exist_ok=True)
    return target


@pytest.mark.slow
def test_equal_sources_hit_the_cache_and_a_changed_gradient_formula_does_not(repo_root: Path, tmp_path: Path) -> None:
    package, cache = installed_layout(repo_root, tmp_path / "package"), tmp_path / "cache"
    cold = run(package, cache)
    warm = run(package, cache)
    formula = package / "sparse_compile" / "kernels" / "gathered_linear" / "op.py"
    old = "return gathered_input_linear(d_y, weight.T, channels, ctx.provider), None, None, None"
    text = formula.read_text()
    assert text.count(old) == 1, "the formula that this test changes has moved"
    # In place: what a cache would take for the same program.
    formula.write_text(text.replace(old, old.replace("(d_y,", "(3 * d_y,")))
    changed = run(package, cache)

    assert (cold["hits"], cold["bypassed"]) == (0, 0)
    assert warm["hits"] == 1
    assert (warm["loss"], warm["gradient"]) == (cold["loss"], cold["gradient"])
    assert changed["hits"] == 0
    assert changed["loss"] == pytest.approx(cold["loss"])
    assert changed["gradient"] != pytest.approx(cold["gradient"], rel=1e-3)
