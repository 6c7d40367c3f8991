"""A plugin of Axolotl, by which the YAML file of a run turns the backend on.

    plugins:
      - sparse_compile.ecosystem.axolotl.SparseLoRAPlugin
    sparselora:
      preset: o1

The keys below `sparselora` are the fields of `SparseLoRAConfig`, and `enabled`. Axolotl's own SparseLoRA plugin has its
block under the same name, and `enabled`, `predictor_rank`, `layer_sparsity`, `start_step` and `end_step` mean the same.

Axolotl imports this module by the name that the file gives; nothing else does, so Axolotl need not be there. The
interface is that of `axolotl/integrations/base.py` in Axolotl 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found,unused-ignore]
from pydantic import BaseModel

from sparse_compile.compiler.compile import compile as compile_model
from sparse_compile.ecosystem.callback import SparseLoRACallback
from sparse_compile.options.config import SparseLoRAConfig

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["SparseLoRAPlugin", "SparseLoRAPluginArgs"]

BLOCK = "sparselora"
"""The key of the YAML file below which the options stand."""

ADAPTER_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Axolotl's fused adapters, on by default: they compute a layer and its adapter where the compiler cannot see them."""


class SparseLoRAPluginArgs(BaseModel):
    """What the plugin adds to the keys that Axolotl knows."""

    sparselora: dict[str, Any] | None = None


class SparseLoRAPlugin(BasePlugin):  # type: ignore[misc,unused-ignore]
    """Compile the model of an Axolotl run with the backend `sparselora`."""

    def get_input_args(self) -> str:
        """Name the class that adds `sparselora` to the keys of the file."""
        return f"{SparseLoRAPluginArgs.__module__}.{SparseLoRAPluginArgs.__name__}"

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Check the file before anything is loaded, and have Axolotl leave adapters to the compiler.

        Raises:
            ValueError: An option that does not exist or is wrong, or a key of the file that does the same work
                elsewhere.
        """
        if options_of(cfg) is None:
            return
        if cfg.get("torch_compile"):
            raise ValueError(f"{BLOCK} compiles the model: leave torch_compile out of the file, or set it to false")
        for other in cfg.get("plugins") or ():
            if other.startswith("axolotl.integrations.sparselora"):
                raise ValueError(f"two plugins read the block {BLOCK}: leave {other} out of the file, or this one")
        for kernel in ADAPTER_KERNELS:
            if cfg.get(kernel):
                raise ValueError(
                    f"{kernel} hides adapters from the compiler: leave it out of the file, or set it to false"
                )
            cfg[kernel] = False  # unset, Axolotl would switch it on

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Trainer) -> None:
        """Compile the model that the trainer trains, and tell the schedule where the run stands.

        Not once the model is loaded: Axolotl loads it for inference and merging too.
        """
        options = options_of(cfg)
        if options is None:
            return
        compile_model(trainer.model, options)  # type: ignore[type-var]
        trainer.add_callback(SparseLoRACallback())


def options_of(cfg: Mapping[str, Any]) -> SparseLoRAConfig | None:
    """Return the options of a file; None where it switches the plugin off.

    Raises:
        ValueError: The block is no mapping, or an option in it does not exist or is wrong.
    """
    block = cfg.get(BLOCK) or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{BLOCK} is a block of options, such as `preset: o1`, got {block!r}")
    options = {name: value for name, value in block.items() if value is not None}
    enabled = options.pop("enabled", True)
    config = SparseLoRAConfig.from_options(options)
    return config if enabled else None
