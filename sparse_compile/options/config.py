"""What the user may choose, checked at once.

Everything here is pure: a configuration is an immutable, hashable and picklable value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from sparse_compile.options import checks as check
from sparse_compile.options import release as upstream
from sparse_compile.options.checks import FrozenMapping
from sparse_compile.options.presets import AUTO_DENSE_EVERY, AUTO_EXIT, DEFAULT_START_FRACTION, PRESETS
from sparse_compile.options.recipe import Recipe, recipe_option
from sparse_compile.options.schedule_handle import ScheduleHandle

if TYPE_CHECKING:
    from typing_extensions import Self

TOKEN_SELECTIONS = ("roles", "all_sparse", "random_dense")
CHANNEL_SELECTIONS = ("svd", "random")
KERNELS = ("measured", "triton")
SURROGATE_GRADIENTS = ("exact", "detached")
MASKINGS = ("off", "auto")
MASK_GRADIENTS = ("straight-through", "exact")
"""Gradients of a masked adapter: the mask left out and the products re-associated (LoRS, section 3), or as they are."""

DEFAULT_MASK_THRESHOLD = 0.3
"""Fraction of zeros from which on a weight counts as pruned."""


@dataclass(frozen=True)
class SparseLoRAConfig:
    """Choose what the ``sparselora`` backend does to a model.

    Attributes:
        preset: ``"none"`` (analyses and canonicalisation only), ``"exact"`` (nothing approximate), ``"o1"`` (default,
            conservative), ``"o2"`` (aggressive), or ``"auto"``: a map that is fitted in the run's own dense steps
            stands for each feed-forward block but the first, and context tokens leave at half of the depth
            (``context_exit``). The sparsities behind ``o1`` and ``o2`` are those of :func:`preset_sparsity`; source:
            the ``o1`` and ``o2`` modes of the SparseLoRA release, by depth.
        layer_sparsity: Site name (or a suffix of whole dotted parts, see :func:`match_site`) to the fraction of its
            channels that context tokens skip, in [0, 1). Where given it replaces the preset's schedule: a site that it
            does not name is dense. Default ``None``: the preset decides.
        recipe: What context tokens compute at each site in place of its frozen block: a :class:`Recipe`, or the folder
            that holds one. Where given it replaces the preset's schedule: a site that it does not name
            is dense. Default ``None``: channels are left out, as the preset or ``layer_sparsity`` says.
        surrogate_gradient: Gradient of a recipe's maps: ``"exact"`` (default) or ``"detached"`` (none passes through
            them: cheaper, and another training).
        context_exit: Fraction of the depth, in [0, 1], behind which context tokens leave the residual stream: each
            later block reads them, as keys and values alone, as they were there, changed by a map that is fitted in
            the run's dense steps. 1 is nowhere. Default ``None``: 0.5 with preset ``"auto"`` where no recipe and no
            ``layer_sparsity`` takes its place, else 1.
        predictor_rank: Rank of the SVD factors computed here, in singular values, at least 1. Default 8 (the paper's
            SVD sparsity estimator). Factors read from ``predictor_path`` have the rank they were stored with.
        predictor_path: Upstream ``model.safetensors`` (or the folder that holds it) with ready factors. Default
            ``None``: factors are computed from the frozen weights.
        predictor_tokens: Context tokens that an FFN score reads: that many evenly spaced ones of each sequence, at
            least 1 (default 16), ``"all"`` (the paper's formula), or ``"mean"`` (the mean of each sequence, as the
            published code does; near chance in ``docs/predictor.md``). Attention scores read all context tokens.
        start_step: First sparse step: a ``float`` in [0, 1] is a fraction of the run, an ``int`` a number of optimizer
            steps. Default ``None``: 0.05 where the length of the run is known (the paper keeps the first 5-10% dense),
            else 20 steps.
        end_step: First dense step after the sparse phase, in the same units. Default ``None``: what the recipe says,
            else never.
        dense_every: Of how many steps of the sparse phase one is dense, at least 2. Maps are fitted anew to its tokens,
            with adapters as they are by then. Default ``None``: what the recipe says; else 8 with preset ``"auto"`` or
            a ``context_exit``, else no step. A recipe's maps stay as they are without it.
        schedule: Handle that knows the length of the run (``total_steps``, in optimizer steps), which fractions need.
            Default ``None``: :class:`SparseLoRACallback` may still supply it.
        keep_logits: Compute every row of the logits a training forward returns, those that the loss ignores too.
            Default ``False``: such rows are left out and hold NaN. Set it where something reads them in training, such
            as a metric over all tokens or a second loss.
        merge_low_precision: Let ``order_adapter_products`` round a merged weight ``W + s B A`` to fp16 or bf16, where
            that is faster: it loses the digits of an adapter that is small beside its weight, so it is not exact.
            Default ``False``: weights are merged in fp32 and fp64 alone.
        token_bucket: Multiple, in tokens, that the number of output tokens is rounded up to, so that a graph has fixed
            sizes, waits for no device and can be captured by CUDA graphs (``inductor={"triton.cudagraphs": True}``);
            another multiple is another compilation. Labels must be seen on the CPU, in :func:`token_roles` or by
            :class:`SparseLoRACallback`. Default ``None``: the number is read from the device in each step.
        token_capacity: Output tokens, at least 1, that a graph of fixed sizes has room for, instead of a bucket:
            nothing is counted, and a batch with more is an error (on a GPU a device assert). Default ``None``.
        kernels: Which kernels compute sparse products: ``"measured"`` (default; those that a measurement has shown to
            be fastest on such a device), or ``"triton"`` (the generated ones wherever they run).
        preserve_weight_mask: ``"auto"``: adapters of pruned layers keep their zeros (LoRS, arXiv 2501.08582): the layer
            is trained as ``(W + s B A) * (W != 0)``, with every preset, in both phases and in evaluation. Default
            ``"off"``: it is another function than the model's.
        mask_threshold: Fraction of zeros, in (0, 1], from which on a layer counts as pruned. Default 0.3.
        mask_gradient: Gradients of a masked layer's adapter: ``"straight-through"`` (default; the paper's, which leave
            the mask out) or ``"exact"`` (of the masked function, for one more product as large as the layer's).
        disable: Names of passes that do not run. Default: none.
        strict: Raise where an approximate pass fails or a name matches no site, instead of warning. Default ``False``.
            Where ``preserve_weight_mask`` fails that is an error anyhow.
        dump_dir: Folder for the graphs before and after each pass. Default ``None``: the environment variable
            ``SPARSELORA_DUMP`` decides.
        seed: Seed of the randomised SVD and of the random selections below, in [0, 2**63). Default 0.
        ignore_index: Label of a token that carries no loss. Default -100 (``torch.nn.functional.cross_entropy``).
        token_selection: Which tokens are computed densely: ``"roles"`` (default; the output tokens), or one of the two
            ablations of the paper's Table 8: ``"all_sparse"`` (none) and ``"random_dense"`` (as many tokens as there
            are output tokens, at random).
        channel_selection: How channels are chosen: ``"svd"`` (default; the predictor) or ``"random"`` (ablation).
        inductor: Inductor's own options, handed on as they are (``torch._inductor.list_options()``). Default: none.

    Raises:
        ValueError: An unknown option, or a value outside what is said above; the message names it.
    """

    preset: str = "o1"
    layer_sparsity: Mapping[str, float] | None = None
    recipe: Recipe | None = None
    surrogate_gradient: str = "exact"
    context_exit: float | None = None
    predictor_rank: int = 8
    predictor_path: str | None = None
    predictor_tokens: str | int = 16
    start_step: float | int | None = None
    end_step: float | int | None = None
    dense_every: int | None = None
    # Two equal configurations have equal hashes whatever the handle hashes to, so it need not be hashable.
    schedule: ScheduleHandle | None = field(default=None, hash=False)
    keep_logits: bool = False
    merge_low_precision: bool = False
    token_bucket: int | None = None
    token_capacity: int | None = None
    kernels: str = "measured"
    preserve_weight_mask: str = "off"
    mask_threshold: float = DEFAULT_MASK_THRESHOLD
    mask_gradient: str = "straight-through"
    disable: frozenset[str] = frozenset()
    strict: bool = False
    dump_dir: str | None = None
    seed: int = 0
    ignore_index: int = -100
    token_selection: str = "roles"
    channel_selection: str = "svd"
    # Inductor takes lists among its values.
    inductor: Mapping[str, Any] = field(default=FrozenMapping(), hash=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Reject unknown options as the ``ValueError`` that every other mistake is, not as a ``TypeError``."""
        check.reject_unknown(kwargs, [f.name for f in fields(cls)], "option")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        normalised = {
            "preset": check.choice("preset", self.preset, PRESETS),
            "layer_sparsity": check.layer_sparsity(self.layer_sparsity),
            "recipe": recipe_option(self.recipe),
            "surrogate_gradient": check.choice("surrogate_gradient", self.surrogate_gradient, SURROGATE_GRADIENTS),
            "context_exit": check.depth("context_exit", self.context_exit),
            "predictor_rank": check.integer("predictor_rank", self.predictor_rank, minimum=1),
            "predictor_path": check.path("predictor_path", self.predictor_path),
            "predictor_tokens": check.predictor_tokens(self.predictor_tokens),
            "start_step": check.step("start_step", self.start_step),
            "end_step": check.step("end_step", self.end_step),
            "dense_every": check.dense_every(self.dense_every),
            "keep_logits": check.boolean("keep_logits", self.keep_logits),
            "merge_low_precision": check.boolean("merge_low_precision", self.merge_low_precision),
            "token_bucket": check.optional_integer("token_bucket", self.token_bucket, minimum=1),
            "token_capacity": check.optional_integer("token_capacity", self.token_capacity, minimum=1),
            "kernels": check.choice("kernels", self.kernels, KERNELS),
            "preserve_weight_mask": check.choice("preserve_weight_mask", self.preserve_weight_mask, MASKINGS),
            "mask_threshold": check.mask_threshold(self.mask_threshold),
            "mask_gradient": check.choice("mask_gradient", self.mask_gradient, MASK_GRADIENTS),
            "disable": check.disable(self.disable),
            "strict": check.boolean("strict", self.strict),
            "dump_dir": check.path("dump_dir", self.dump_dir),
            "seed": check.integer("seed", self.seed, minimum=0, limit=2**63),
            "ignore_index": check.integer("ignore_index", self.ignore_index),
            "token_selection": check.choice("token_selection", self.token_selection, TOKEN_SELECTIONS),
            "channel_selection": check.choice("channel_selection", self.channel_selection, CHANNEL_SELECTIONS),
            "inductor": check.inductor(self.inductor),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)
        if self.schedule is not None and not hasattr(self.schedule, "total_steps"):
            raise ValueError(f"schedule must be a Schedule (it has total_steps), got {self.schedule!r}")
        self._check_order()
        if self.recipe is not None and self.layer_sparsity is not None:
            raise ValueError("recipe and layer_sparsity exclude each other: both say what each site becomes")
        if self.recipe is not None and self.recipe.exit is not None and self.context_exit is not None:
            raise ValueError("recipe and context_exit exclude each other here: the recipe says where context leaves")
        if self.preset in ("none", "exact") and self.exit_depth < 1:
            raise ValueError(
                f"context_exit approximates, and preset {self.preset!r} promises not to: use another preset"
            )
        if self.token_bucket is not None and self.token_capacity is not None:
            raise ValueError("token_bucket and token_capacity exclude each other: both say how many slots a graph has")
        if self.requested & self.disable:
            raise ValueError("preserve_weight_mask='auto' asks for the pass that disable leaves out")

    def _check_order(self) -> None:
        """Reject an end before the start, where the two can be compared without knowing the length of the run."""
        start, end = self.start_step, self.dense_from
        if end is None:
            return
        if start is None:
            # A fraction as the end needs the length of the run; where that is known the default is a fraction too. The
            # default of a run of unknown length is no reason to refuse an end: the length may still come.
            start = DEFAULT_START_FRACTION if isinstance(end, float) else 0
        comparable = type(start) is type(end) or 0 in (start, end)
        if comparable and end < start:
            default = " (the default)" if self.start_step is None else ""
            source = " of the recipe" if self.end_step is None else ""
            raise ValueError(f"end_step {end}{source} lies before start_step {start}{default}")

    @property
    def requested(self) -> frozenset[str]:
        """Names of the passes that an option asks for because they change the function."""
        return frozenset() if self.preserve_weight_mask == "off" else frozenset({"preserve_weight_mask"})

    @property
    def dense_period(self) -> int | None:
        """Of how many steps of the sparse phase one is dense, by option, recipe or preset; None where none is."""
        if self.dense_every is not None:
            return self.dense_every
        if self.recipe is not None and self.recipe.dense_every is not None:
            return self.recipe.dense_every
        fits_maps = (self.preset == "auto" and not self.site_option) or self.exit_depth < 1
        return AUTO_DENSE_EVERY if fits_maps else None

    @property
    def dense_from(self) -> float | int | None:
        """First dense step after the sparse phase, by the option or the recipe, as in `end_step`; None for never."""
        return self.recipe.end_step if self.end_step is None and self.recipe is not None else self.end_step

    @property
    def exit_depth(self) -> float:
        """Fraction of the blocks behind which context tokens leave the residual stream; 1 where they stay."""
        if self.context_exit is not None:
            return self.context_exit
        return AUTO_EXIT if self.preset == "auto" and not self.site_option else 1.0

    @property
    def site_option(self) -> str:
        """Name of the option that says what each site becomes; empty where the preset decides."""
        return "recipe" if self.recipe is not None else "layer_sparsity" if self.layer_sparsity is not None else ""

    @property
    def site_sparsity(self) -> Mapping[str, float] | None:
        """By site name, the fraction of its channels that context tokens skip, 1 for a map or exit; None by preset."""
        if self.recipe is None:
            return self.layer_sparsity
        behind = {} if self.recipe.exit is None else dict.fromkeys((self.recipe.exit.site, *self.recipe.exit.maps), 1.0)
        return {name: 1.0 if site.surrogate else site.sparsity for name, site in self.recipe.sites.items()} | behind

    def to_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain values for ``torch.compile(options=...)``."""
        default = type(self)()
        return {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Self:
        """Build a configuration from the plain dict that torch hands to a backend (``None``: all defaults).

        Raises:
            ValueError: Not a mapping, an unknown key (named, with what exists), or an invalid value.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ValueError(f"options must be a dict, got {type(options).__name__}; use SparseLoRAConfig.to_options()")
        check.reject_unknown(options, [f.name for f in fields(cls)], "option")
        return cls(**options)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], mode: str = "o1", **overrides: Any) -> Self:
        """Read a SparseLoRA release: ``config.json`` for the schedule, ``model.safetensors`` for the factors.

        Args:
            path: A local folder, or the id of a repository on the Hugging Face hub, which is downloaded.
            mode: One of the ``modes`` of the file. ``"o1"`` and ``"o2"`` also become the preset.
            **overrides: Fields of this class that win over what the file says. ``predictor_path=None`` computes the
                factors from the weights instead of reading them.

        Raises:
            ValueError: No such folder, file or mode, or a file that is not of this kind.
            ImportError: ``path`` is a hub id and ``huggingface_hub`` is not installed.
        """
        values = upstream.read_release(path, mode, factors="predictor_path" not in overrides)
        if mode in PRESETS:
            values["preset"] = mode
        return cls(**{**values, **overrides})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read a YAML file of the reference implementation.

        Its keys are ``sparsity`` (site name suffix to sparsity), ``mode`` (``svd_<rank>`` or ``dense``),
        ``start_step``, ``end_step`` and a few more, all listed by :func:`sparse_compile.options.release.read_yaml`.
        A key that is absent leaves this class's default.

        Args:
            path: The file.
            **overrides: Fields of this class that win over what the file says.

        Raises:
            ValueError: The file is absent or not of this kind, a key is unknown, or a value is invalid.
        """
        return cls(**{**upstream.read_yaml(path), **overrides})


def _plain(value: Any) -> Any:
    if isinstance(value, FrozenMapping):
        return dict(value)
    if isinstance(value, Recipe):
        return value.folder or value
    return sorted(value) if isinstance(value, frozenset) else value
