"""How Dynamo names what it captured, and what it guards on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

_CONTAINERS = {"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod", "__closure__", "cell_contents"}
"""What stands between the names of a path and is no part of it."""


def source_of(node: fx.Node) -> Any:
    """Return Dynamo's record of how an input of a graph is reached from the frame's variables; None without one."""
    return getattr(node, "_dynamo_source", None)


def take_source(node: fx.Node, origin: fx.Node) -> None:
    """Give a copied input the source of its original."""
    if hasattr(origin, "_dynamo_source"):
        node._dynamo_source = origin._dynamo_source


def copy_dynamo_attributes(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Carry over what Dynamo and AOTAutograd hang on a GraphModule beside its graph.

    `meta` holds `dynamo_compile_id` (AOTAutograd's sign that sources and guards apply); `_param_name_to_source` and the
    like are plain attributes.
    """
    target.meta = dict(source.meta)
    for name, value in source.__dict__.items():
        if name not in target.__dict__ and name not in ("_graph", "_code"):
            target.__dict__[name] = value
    if "_param_name_to_source" in source.__dict__:
        target.__dict__["_param_name_to_source"] = dict(source.__dict__["_param_name_to_source"])


def register_graph_buffer(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    """Add a tensor constant to a graph captured by Dynamo.

    AOTAutograd refuses a parameter or buffer without an entry in `_param_name_to_source`.
    """
    from torch._dynamo.source import ConstantSource

    gm.register_buffer(name, value, persistent=False)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(source_name=name)


def module_path(source: Any) -> tuple[str, ...]:
    """Return the names by which a Dynamo source walks from a root object to a parameter: `("layers", "0", "weight")`.

    A source is a chain of attribute and item look-ups. Modules are reached through `_modules[name]` (or plain
    attributes), parameters and buffers through `_parameters[name]` and `_buffers[name]`.
    """
    from torch._dynamo import source as sources

    names: list[str] = []
    while isinstance(source, sources.ChainedSource):  # type: ignore[attr-defined]
        if isinstance(source, sources.DictGetItemSource | sources.GetItemSource):
            names.append(str(source.index))
        elif isinstance(source, sources.AttrSource):
            names.append(source.member)
        source = source.base
    return tuple(name for name in reversed(names) if name not in _CONTAINERS)


def module_of(node: fx.Node) -> str:
    """Return the dotted name of the innermost module in whose forward a node was captured; empty where that is unknown.

    Dynamo notes modules as expressions from a local variable: `L['self'].__dict__['_modules']['model'].layers.0`.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    names = re.findall(r"\w+", re.sub(r"^L\[['\"]\w+['\"]\]", "", path))
    return ".".join(name for name in names if name not in _CONTAINERS)


def root_name(source: Any) -> str | None:
    """Return the name of the local variable that a Dynamo source begins at, None where it begins elsewhere."""
    from torch._dynamo.source import ChainedSource, LocalSource  # type: ignore[attr-defined]

    while isinstance(source, ChainedSource):
        source = source.base
    return source.local_name if isinstance(source, LocalSource) else None


def frame_locals() -> Mapping[str, object]:
    """Return the local variables of the frame that Dynamo compiles in this thread, none where it does not."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return {}
    scope: Mapping[str, object] = translator.output.local_scope
    return scope


def install_value_guard(module: str, attribute: str, key: int | str | None = None) -> None:
    """Make Dynamo recompile the frame being compiled when a module-level plain value changes.

    Args:
        module: dotted module name of one that is imported, such as `"sparse_compile.training.session"`.
        attribute: name of the variable in that module.
        key: where given, the variable is a dict and its item `key` is guarded.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource, DictGetItemSource, ImportSource
    from torch._guards import Source, TracingContext

    # `__import__("a.b")`, which an ImportSource evaluates, returns the top package.
    package, *rest = module.split(".")
    source: Source = ImportSource(package)
    for name in (*rest, attribute):
        source = AttrSource(source, name)
    if key is not None:
        source = DictGetItemSource(source, key)
    TracingContext.get().guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.EQUALS_MATCH))


def install_identity_guards(placeholders: Iterable[fx.Node]) -> None:
    """Make Dynamo recompile the frame being compiled when an input of the graph is another object than now.

    Dynamo shares a graph between models of one class: parameters are inputs, and it compares their shapes alone. The
    object from which an input is reached (the module) is guarded too: it is how Dynamo tells recompilations for another
    model, which are not limited in number, from those for another shape.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import LocalSource
    from torch._guards import ChainedSource, TracingContext

    guards = TracingContext.get().guards_context.dynamo_guards
    for node in placeholders:
        source = source_of(node)
        if source is None:
            continue
        guards.add(source.make_guard(GuardBuilder.ID_MATCH))
        while isinstance(source, ChainedSource):
            source = source.base
        if isinstance(source, LocalSource):
            guards.add(source.make_guard(GuardBuilder.ID_MATCH))


def compile_id(gm: fx.GraphModule) -> str:
    """Return Dynamo's name of the compilation a graph belongs to, such as `"0/1"`."""
    return str(gm.meta.get("dynamo_compile_id", "0/0"))


def frame_key(gm: fx.GraphModule) -> int:
    """Return Dynamo's number of the frame a graph was captured from, equal for all its recompilations."""
    found = gm.meta.get("dynamo_compile_id")
    return int(getattr(found, "frame_id", None) or 0)


def graphs_of_frame() -> int:
    """Return how many graphs Dynamo keeps that count against its limit for the frame being compiled, 0 outside.

    It counts them as Dynamo does: those that are guarded by the identity of another model do not count.
    """
    from torch._dynamo.cache_size import _has_same_id_matched_objs
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return 0
    frame: Any = SimpleNamespace(f_locals=output.local_scope)
    return sum(_has_same_id_matched_objs(frame, entry) for entry in _debug_get_cache_entry_list(output.root_tx.f_code))


def recompile_limit() -> int:
    """Return how many graphs Dynamo keeps of one frame; beyond that it runs the frame eagerly."""
    from torch._dynamo import config

    return config.recompile_limit


def is_control_flow_exception(error: Exception) -> bool:
    """Tell whether an exception is how Dynamo restarts or skips an analysis, which a backend must let through."""
    from torch._dynamo import exc

    return isinstance(error, exc.RestartAnalysis | exc.SkipFrame)


def registered_backend(name: str) -> object:
    """Return what Dynamo finds by the name of a backend; None where it finds nothing."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup_backend(name)
    except InvalidBackend:
        return None


def compiled_graphs() -> int:
    """Return how many graphs Dynamo has handed to a backend in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Let Dynamo trace a function anew however often it was traced: at its limit it would run the function eagerly."""
    from torch._dynamo import config

    return config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)  # type: ignore[no-any-return]


def whole_graphs_under_ddp() -> AbstractContextManager[Any]:
    """Have Dynamo leave graphs whole under `DistributedDataParallel`.

    Its DDP optimizer would cut them into buckets of trained parameters, so that the reduction of one overlaps with the
    backward of the next. What the user chose beside it is left alone.
    """
    from torch._dynamo import config
    from torch._dynamo.utils import get_optimize_ddp_mode

    if get_optimize_ddp_mode() != "ddp_optimizer":
        return nullcontext()
    return config.patch(optimize_ddp=False)  # type: ignore[no-any-return]
