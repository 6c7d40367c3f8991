"""Every private PyTorch name that the package uses still exists; a failure names it and what is built on it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_compile
from sparse_compile import kernels, passes, torch_private
from sparse_compile.torch_private import dynamo

PRIVATE = Path(torch_private.__path__[0])

NAMES: dict[str, str] = {
    "torch._library.fake_impl.allocate_size": "new_unbacked_size",
    "torch._library.fake_impl.FakeImplCtx": "new_unbacked_size",
    "torch.fx._lazy_graph_module._LazyGraphModule": "uncompiled_graph_module",
    "torch._dynamo.source.ConstantSource": "register_graph_buffer",
    "torch._dynamo.source.ChainedSource": "module_path",
    "torch._dynamo.source.DictGetItemSource": "module_path, install_value_guard",
    "torch._dynamo.source.GetItemSource": "module_path",
    "torch._dynamo.source.AttrSource": "module_path, install_value_guard",
    "torch._dynamo.source.ImportSource": "install_value_guard",
    "torch._dynamo.guards.GuardBuilder.EQUALS_MATCH": "install_value_guard",
    "torch._dynamo.guards.GuardBuilder.ID_MATCH": "install_identity_guards",
    "torch._dynamo.source.LocalSource": "install_identity_guards, root_name",
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx": "frame_locals",
    "torch._dynamo.config.optimize_ddp": "whole_graphs_under_ddp",
    "torch._dynamo.utils.get_optimize_ddp_mode": "whole_graphs_under_ddp",
    "torch._inductor.config.get_config_copy": "inductor_options",
    "torch._guards.ChainedSource": "install_identity_guards",
    "torch._guards.Source.make_guard": "install_value_guard",
    "torch._guards.TracingContext.get": "install_value_guard",
    "torch._subclasses.fake_tensor.FakeTensor": "is_fake, StandIns",
    "torch._higher_order_ops.wrap.uid": "next_checkpoint_id",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.ignore_fresh_unbacked_symbols": "StandIns",
    "torch._dispatch.python.enable_python_dispatcher": "StandIns",
    "torch._subclasses.fake_tensor.FakeTensorMode.from_tensor": "StandIns",
    "torch.utils._sympy.symbol.symbol_is_type": "is_unbacked",
    "torch.utils._sympy.symbol.SymT": "is_unbacked",
    "torch.fx.graph._Namespace": "keep_used_names",
    "torch._dynamo.exc.RestartAnalysis": "is_control_flow_exception",
    "torch._dynamo.exc.SkipFrame": "is_control_flow_exception",
    "torch._dynamo.config.recompile_limit": "without_recompile_limit, recompile_limit",
    "torch._dynamo.cache_size._has_same_id_matched_objs": "graphs_of_frame",
    "torch._dynamo.eval_frame._debug_get_cache_entry_list": "graphs_of_frame",
    "torch._dynamo.config.accumulated_recompile_limit": "without_recompile_limit",
    "torch._functorch.config.activation_memory_budget": "saving_what_is_marked",
    "torch.nn.Module._compiled_call_impl": "backend_name, backend_options, uncompiled, around_compiled_calls",
    "torch._assert_async": "assert_on_device",
    "torch.Tensor._version": "write_count",
    "torch.fx.Node._erased": "is_erased",
    "torch._inductor.config.reorder_for_peak_memory": "an option that backend.py gives to Inductor",
    "torch._inductor.list_mode_options": "compile_with_inductor",
    "torch._inductor.utils.clear_caches": "forget_compiled",
    "torch._inductor.cpp_builder.get_cpp_compiler": "cpp_compiler",
    "torch._inductor.exc.InvalidCxxCompiler": "cpp_compiler",
    "torch._inductor.runtime.cache_dir_utils.cache_dir": "cache_folders",
    "torch._inductor.runtime.cache_dir_utils.triton_cache_dir": "cache_folders",
    "torch._dynamo.backends.registry.lookup_backend": "registered_backend",
    "torch._dynamo.exc.InvalidBackend": "registered_backend",
    "torch._dynamo.utils.counters": "compiled_graphs",
    "torch._inductor.codecache.PyCodeCache.load": "load_source",
    "torch._inductor.compile_fx.compile_fx": "compile_with_inductor",
    "torch.compiler.config.cache_key_tag": "compile_with_inductor",
    "torch.utils._pytree.tree_flatten": "flattened",
    "torch._C._nn.linear": "LINEAR",
    "torch._ops.OpOverload": "overload, overload_name, overload_writes",
    "torch._ops.OpOverloadPacket": "op_namespace",
    "torch.ops.mkldnn._linear_pointwise": "onednn_linear",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "cpu_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "cpu_flash_attention_backward",
    "torch.ops.higher_order.tag_activation_checkpoint": "the pass inline_checkpoint_bodies",
}
"""Dotted name to the function that needs it."""


def resolve(dotted: str) -> Any:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("dotted", NAMES)
def test_still_exists(dotted: str) -> None:
    try:
        resolve(dotted)
    except (AttributeError, ModuleNotFoundError) as error:
        pytest.fail(f"PyTorch {torch.__version__} has no {dotted} ({error}); mend {NAMES[dotted]} in torch_private/")


def test_the_check_can_fail() -> None:
    with pytest.raises(AttributeError):
        resolve("torch._dynamo.source.NoSuchSource")


def private_imports(source: str) -> Iterator[str]:
    """Yield the dotted names that a source imports from private modules of PyTorch."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("torch.") and "._" in name)


def private_attributes(source: str) -> Iterator[str]:
    """Yield attributes with a leading underscore that are reached from something else than an object of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            path = ast.unparse(node)
            if path.startswith("torch.") or node.attr in FOREIGN_ATTRIBUTES:
                yield path


FOREIGN_ATTRIBUTES = {
    "_compiled_call_impl", "_dynamo_source", "_erased", "_forward_hooks", "_graph_namespace", "_orig_mod",
    "_param_name_to_source", "_qualified_op_name", "_used_names",
    "_schema", "_version",
}  # fmt: skip
"""Private attributes of PyTorch's objects, which no name of a module announces."""


def test_every_import_of_a_private_module_is_listed() -> None:
    """What `torch_private/` imports from private modules stands in the table."""
    imported = [name for file in PRIVATE.glob("*.py") for name in private_imports(file.read_text(encoding="utf-8"))]
    # Modules of which single names are listed.
    unlisted = {name for name in imported if not any(listed.startswith(name) for listed in NAMES)}
    assert not unlisted, f"add to NAMES: {sorted(unlisted)}"


def test_private_modules_are_imported_nowhere_else() -> None:
    for package in (sparse_compile, passes, kernels):
        for file in Path(package.__path__[0]).rglob("*.py"):
            found = set(private_imports(file.read_text(encoding="utf-8")))
            found |= set(private_attributes(file.read_text(encoding="utf-8")))
            if file.parent != PRIVATE:
                assert not found, f"move {sorted(found)} of {file.name} to torch_private/"


def test_attributes_of_a_captured_graph() -> None:
    """What Dynamo hangs on a graph, which no import would miss."""
    seen: dict[str, Any] = {}
    layer = torch.nn.Linear(2, 2)

    def backend(gm: Any, example_inputs: Any) -> Any:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        seen["source"] = [dynamo.module_path(getattr(node, "_dynamo_source", None)) for node in placeholders]
        roots = {dynamo.root_name(dynamo.source_of(node)) for node in placeholders}
        seen["roots"] = [dynamo.frame_locals().get(name) for name in roots if name]
        seen["compile id"] = gm.meta.get("dynamo_compile_id")
        seen["parameter sources"] = getattr(gm, "_param_name_to_source", None)
        seen["frame"] = dynamo.frame_key(gm)
        return gm.forward

    torch.compile(layer, backend=backend)(torch.ones(1, 2))
    assert any(root is layer for root in seen["roots"]), "sources no longer begin at a variable of the frame"
    assert set(seen["source"]) >= {("weight",), ("bias",)}, "placeholders no longer carry `_dynamo_source`"
    assert str(seen["compile id"]) == "0/0", "`gm.meta` no longer holds `dynamo_compile_id`"
    assert isinstance(seen["parameter sources"], dict), "GraphModules no longer carry `_param_name_to_source`"
    assert seen["frame"] == 0
