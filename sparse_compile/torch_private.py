"""Every private PyTorch name that this package uses, each behind a function that says what it is for.

When a PyTorch release moves one of them, this is the only file to mend; `tests/test_torch_private.py` names which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, Final

import sympy
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket  # what `torch.ops` holds

from .source_hash import source_hash

LINEAR: Final = torch._C._nn.linear
"""What a graph calls for `torch.nn.functional.linear`."""

WRAPPER_NAMES: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Names that `torch.compile` and checkpoint wrappers put into a module's path, which no user knows."""


def overload(target: object) -> OpOverload | None:
    """Return the target of a call where it is one overload of an op, such as `torch.ops.aten.add.Tensor`."""
    return target if isinstance(target, OpOverload) else None


def is_op(target: object) -> bool:
    """Tell whether the target of a call is an op, or one overload of it."""
    return isinstance(target, OpOverload | OpOverloadPacket)


def overload_name(target: OpOverload) -> str:
    """Return the bare name of an op: `"add"`."""
    return str(target._schema.name.split("::")[-1])


def overload_writes(target: OpOverload) -> bool:
    """Tell whether an op writes to one of its operands."""
    return bool(target._schema.is_mutable)


def source_of(node: fx.Node) -> Any:
    """Return Dynamo's record of how an input of a graph is reached from the frame's variables; None without one."""
    return getattr(node, "_dynamo_source", None)


def take_source(node: fx.Node, origin: fx.Node) -> None:
    """Give a copied input the source of its original."""
    if hasattr(origin, "_dynamo_source"):
        node._dynamo_source = origin._dynamo_source


def is_erased(node: fx.Node) -> bool:
    """Tell whether a node was erased from its graph."""
    return node._erased


def write_count(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to in place, not counting `.data`; None for a tensor of inference mode."""
    return None if tensor.is_inference() else tensor._version


def inductor_options() -> Mapping[str, Any]:
    """Return Inductor's options with their values."""
    from torch._inductor import config

    return config.get_config_copy()


def new_unbacked_size(max_size: int | torch.SymInt) -> torch.SymInt:
    """Return a fresh data-dependent size in [0, max_size], to be called in the fake of a custom op.

    The public `torch.library.get_ctx().new_dynamic_size()` refuses while `capture_dynamic_output_shape_ops` is off.
    That setting guards a user's program against surprises; our sizes are bounded and never branched on.
    """
    from torch._library.fake_impl import allocate_size

    shape_env = torch.library.get_ctx()._shape_env
    assert shape_env is not None, "a data-dependent size needs a ShapeEnv"
    size: torch.SymInt = allocate_size(shape_env)  # type: ignore[no-untyped-call]
    torch._check(size <= max_size)  # type: ignore[no-untyped-call]
    return size


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have the device check a 0-dim bool tensor in its own order of work, which a CUDA graph may hold."""
    torch._assert_async(condition, message)


UNKNOWN_SIZE = 8191
"""Stands for a size that depends on data, of which nothing is seen at tracing: a prime, which no view divides."""


def size_hint(size: int | torch.SymInt) -> int:
    """Return the size seen at tracing, without adding a guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as an expression over the graph's symbols: equal expressions are equal sizes for every batch."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def evaluate_on_stand_ins(like: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on the stand-ins of a captured graph; data-dependent sizes that it makes are bound to nothing.

    Args:
        like: a stand-in of the graph, whose mode is entered.
        function: what to call.
        *arguments: its arguments, stand-ins among them.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(like, FakeTensor):
        return function(*arguments)
    mode = like.fake_mode
    ignore = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()
    with mode, ignore:
        return function(*arguments)


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
    containers = {"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod", "__closure__", "cell_contents"}
    return tuple(name for name in reversed(names) if name not in containers)


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
        module: dotted module name of one that is imported, such as `"sparse_compile.session"`.
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


def is_fake(value: object) -> bool:
    """Tell whether `value` is a FakeTensor: a tensor with a shape but no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def next_checkpoint_id() -> int:
    """Return a fresh number for the nodes of one activation checkpoint, from PyTorch's own counter."""
    from torch._higher_order_ops.wrap import uid

    return next(uid)


def fake_outputs(gm: fx.GraphModule) -> dict[str, Tensor] | None:
    """Run a captured graph on the stand-ins it was captured with; return the value of every output node by name.

    Returns None for a graph without stand-ins. Symbols made on the way are dropped: AOTAutograd traces the graph
    again and makes its own.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("example_value") for node in placeholders]
    # Dynamo captured with a mode of its own; the one in force now is AOTAutograd's, with the same ShapeEnv.
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    if not modes:
        return None
    mode = modes[0]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    wanted = set(output.all_input_nodes)
    found: dict[str, Tensor] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                found[n.name] = result
            return result

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().get_attr(target, args, kwargs)
            return mode.from_tensor(value) if isinstance(value, Tensor) and not is_fake(value) else value

    ignore = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()
    with mode, ignore:
        _Recorder(gm).run(*values)
    return found


def flattened(value: Any) -> tuple[list[Any], object]:
    """Return the leaves of nested tuples, lists and dicts, and the structure that holds them."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(value)


def compile_id(gm: fx.GraphModule) -> str:
    """Return Dynamo's name of the compilation a graph belongs to, such as `"0/1"`."""
    return str(gm.meta.get("dynamo_compile_id", "0/0"))


def frame_key(gm: fx.GraphModule) -> int:
    """Return Dynamo's number of the frame a graph was captured from, equal for all its recompilations."""
    found = gm.meta.get("dynamo_compile_id")
    return int(getattr(found, "frame_id", None) or 0)


def backend_name(module: nn.Module) -> str | None:
    """Return the name of the backend that a module was compiled for, in place or wrapped; None for an eager module.

    Returns None as well where the name cannot be told: nothing may rest on a module's being eager.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    compiled = getattr(compiled, "compiled", compiled)  # behind `around_compiled_calls`
    context = getattr(module, "dynamo_ctx", None)
    if inspect.isfunction(compiled):
        context = inspect.getclosurevars(compiled).nonlocals.get("self")
    backend: Any = getattr(context, "callback", None)
    # The compiler stands inside wrappers of Dynamo's own, each of which holds the next.
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    name = getattr(backend, "compiler_name", None)
    return name if isinstance(name, str) else None


@contextmanager
def around_compiled_calls(
    module: nn.Module, around: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
) -> Iterator[None]:
    """Enter a context manager around each call of a compiled module, before Dynamo looks at its guards.

    A hook of the module would be part of what Dynamo traces, and come behind the guards.

    Args:
        module: compiled in place, or what `torch.compile` returned; any other is left alone.
        around: takes the arguments of the call.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def call(*args: Any, **kwargs: Any) -> Any:
            with around(args, kwargs):
                return compiled(*args, **kwargs)

        call.compiled = compiled  # type: ignore[attr-defined]
        module._compiled_call_impl = call
        try:
            yield
        finally:
            if getattr(module, "_compiled_call_impl", None) is call:
                module._compiled_call_impl = compiled
    elif "forward" in vars(module) and hasattr(module, "_orig_mod"):
        forward = module.forward

        def wrapped_forward(*args: Any, **kwargs: Any) -> Any:
            with around(args, kwargs):
                return forward(*args, **kwargs)

        module.__dict__["forward"] = wrapped_forward
        try:
            yield
        finally:
            module.__dict__["forward"] = forward
    else:
        yield


@contextmanager
def uncompiled(module: object) -> Iterator[None]:
    """Have a module that was compiled in place run its own code."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        yield
        return
    module._compiled_call_impl = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._compiled_call_impl = compiled  # type: ignore[attr-defined]


def original_module(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` wrapped, or the module itself where it wrapped nothing."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the forward hooks of a module by the number that their handles know them by; a change takes effect."""
    return module._forward_hooks


def is_control_flow_exception(error: Exception) -> bool:
    """Tell whether an exception is how Dynamo restarts or skips an analysis, which a backend must let through."""
    from torch._dynamo import exc

    return isinstance(error, exc.RestartAnalysis | exc.SkipFrame)


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any], mode: str | None
) -> Callable[..., Any]:
    """Compile a graph by AOTAutograd and Inductor.

    AOTAutograd's cache keys a custom op by its name alone: after a change of its backward formula another process would
    go on with the old gradient. A hash of this package's sources is therefore part of every key.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    tag = f"{torch.compiler.config.cache_key_tag}sparselora-{source_hash()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    assert callable(compiled), "ahead-of-time compilation to a file was not asked for"
    return compiled


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Let Dynamo trace a function anew however often it was traced: at its limit it would run the function eagerly."""
    from torch._dynamo import config

    return config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)  # type: ignore[no-any-return]


def has_onednn_linear() -> bool:
    """Tell whether this build of PyTorch has the op behind `onednn_linear`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` by oneDNN, which no public function of PyTorch reaches in fp32; Inductor emits this op.

    Args:
        x: (..., in) fp32.
        weight: (out, in) fp32, strided in any way.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def cpu_flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run PyTorch's fused attention on a CPU; return its result and the softmax's logarithmic denominators.

    `scaled_dot_product_attention` calls it too, and keeps the denominators to itself, which the backward needs.

    Args:
        query: (B, H, Q, D).
        key: (B, H, K, D).
        value: (B, H, K, D).
        mask: (B or 1, H or 1, Q, K), added to the scores.
        scale: what the scores are multiplied by.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, key, value, attn_mask=mask, scale=scale)  # type: ignore[no-any-return]


def cpu_flash_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the operands of `cpu_flash_attention`."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(  # type: ignore[no-any-return]
        d_out, query, key, value, out, logsumexp, 0.0, False, attn_mask=mask, scale=scale
    )


def load_source(source: str) -> ModuleType:
    """Write the source of a module into Inductor's cache, where Triton can read it, and import it from there."""
    from torch._inductor.codecache import PyCodeCache

    module: ModuleType = PyCodeCache.load(source)
    return module


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


def saving_what_is_marked() -> AbstractContextManager[Any]:
    """Have the partitioner save what is marked MUST_SAVE under any activation memory budget, while a graph is compiled.

    With a budget of 0 it saves a graph's inputs and nothing else, marked or not. The least budget above it recomputes
    all the rest as well.
    """
    from torch._functorch import config

    return config.patch(activation_memory_budget=max(config.activation_memory_budget, 1e-6))  # type: ignore[no-any-return]


def running_backward() -> int | None:
    """Return a number for the backward this thread is running, None outside of any."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else int(task)


def after_backward(callback: Callable[[], None]) -> None:
    """Have autograd call `callback` when the backward this thread is running has ended."""
    from torch.autograd import Variable

    Variable._execution_engine.queue_callback(callback)
