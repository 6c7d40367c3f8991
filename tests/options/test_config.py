from __future__ import annotations

import builtins
import copy
import json
import math
import pickle
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import PRESETS, kept_count, match_site, preset_sparsity
from sparse_compile.training.schedule import Schedule

RICH: dict[str, Any] = {
    "preset": "o2",
    "layer_sparsity": {"layers.1.mlp": 0.97, "layers.2.mlp": 0.0},
    "predictor_rank": 4,
    "predictor_path": "factors/model.safetensors",
    "predictor_tokens": 4,
    "start_step": 0.1,
    "end_step": 0.9,
    "keep_logits": True,
    "merge_low_precision": True,
    "token_bucket": 128,
    "preserve_weight_mask": "auto",
    "mask_threshold": 0.5,
    "mask_gradient": "exact",
    "disable": ["sparsify_attention", "insert_predictors"],
    "strict": True,
    "dump_dir": "dump",
    "seed": 7,
    "ignore_index": -1,
    "token_selection": "all_sparse",
    "channel_selection": "random",
    "inductor": {"max_autotune": False, "trace.enabled": False},
}


class TestValue:
    def test_defaults(self) -> None:
        config = SparseLoRAConfig()
        assert (config.preset, config.predictor_rank, config.predictor_tokens) == ("o1", 8, 16)
        assert (config.layer_sparsity, config.start_step, config.end_step) == (None, None, None)
        assert config.to_options() == {}

    def test_options_round_trip(self) -> None:
        config = SparseLoRAConfig(**RICH)
        options = config.to_options()
        assert options == RICH | {"disable": sorted(RICH["disable"])}
        assert {type(value) for value in options.values()} <= {str, int, float, bool, dict, list}
        assert json.loads(json.dumps(options)) == options
        assert SparseLoRAConfig.from_options(options) == config

    def test_options_hold_only_what_differs(self) -> None:
        assert SparseLoRAConfig(preset="o1", start_step=10).to_options() == {"start_step": 10}
        # A fraction is not the count that equals it.
        assert SparseLoRAConfig(end_step=1.0).to_options() == {"end_step": 1.0}

    def test_no_options(self) -> None:
        assert SparseLoRAConfig.from_options(None) == SparseLoRAConfig.from_options({}) == SparseLoRAConfig()

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_compare_and_hash_alike(self, duplicate: Any) -> None:
        config = SparseLoRAConfig(**RICH)
        other = duplicate(config)
        assert other == config
        assert hash(other) == hash(config)
        assert len({config, other, SparseLoRAConfig()}) == 2

    def test_later_changes_of_the_arguments_do_not_reach_it(self) -> None:
        sparsity, inductor = {"mlp": 0.5}, {"max_autotune": True}
        config = SparseLoRAConfig(layer_sparsity=sparsity, inductor=inductor)
        sparsity["mlp"] = 0.9
        inductor.clear()
        assert config.layer_sparsity == {"mlp": 0.5}
        assert config.inductor == {"max_autotune": True}
        with pytest.raises(TypeError):
            config.layer_sparsity["mlp"] = 0.9  # type: ignore[index]
        with pytest.raises(AttributeError):
            config.preset = "o2"  # type: ignore[misc]

    def test_plain_values_are_normalised(self) -> None:
        config = SparseLoRAConfig(
            layer_sparsity={"mlp": np.float32(0.5), "attn": 0},  # type: ignore[dict-item]
            predictor_rank=np.int64(4),
            predictor_path=Path("a/b"),  # type: ignore[arg-type]
            disable=("sparsify_ffn",),  # type: ignore[arg-type]
            start_step=np.float64(0.25),
            end_step=np.float32(0.5),
        )
        assert config.layer_sparsity == {"mlp": 0.5, "attn": 0.0}
        assert [type(value) for value in config.layer_sparsity.values()] == [float, float]
        assert type(config.predictor_rank) is int
        assert config.predictor_path == "a/b"
        assert config.disable == frozenset({"sparsify_ffn"})
        assert [type(config.start_step), type(config.end_step)] == [float, float]

    def test_schedule_is_handed_on_as_the_same_object(self) -> None:
        schedule = Schedule(total_steps=10)
        config = SparseLoRAConfig.from_options({"schedule": schedule})
        assert config.schedule is schedule
        assert config.to_options()["schedule"] is schedule
        assert config != SparseLoRAConfig()


class TestErrors:
    @pytest.mark.parametrize("build", [lambda **options: SparseLoRAConfig(**options), SparseLoRAConfig.from_options])
    def test_unknown_option_is_named_with_a_suggestion_and_the_list(self, build: Any) -> None:
        options = {"layer_sparcity": {}}
        with pytest.raises(ValueError, match=r"'layer_sparcity'.*'layer_sparsity'.*predictor_rank.*token_selection"):
            build(options) if build == SparseLoRAConfig.from_options else build(**options)

    @pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.5", None, [0.5]])
    def test_sparsity_outside_the_range_names_the_site(self, sparsity: Any) -> None:
        with pytest.raises(ValueError, match=r"layers\.3\.mlp"):
            SparseLoRAConfig(layer_sparsity={"layers.2.mlp": 0.5, "layers.3.mlp": sparsity})

    @pytest.mark.parametrize(
        ("option", "values"),
        [
            ("preset", ["o3", "", None, 1, []]),
            ("layer_sparsity", [0.5, [("mlp", 0.5)], {"": 0.5}, {"mlp.": 0.5}, {3: 0.5}]),
            ("predictor_rank", [0, -1, 8.0, "8", True, None]),
            ("predictor_path", [3, "", b"bytes"]),
            ("predictor_tokens", ["some", 0, -4, 2.5, True, None, [1]]),
            ("start_step", [-1, -0.1, 1.1, math.nan, True, "0.1", 1j]),
            ("end_step", [-1, -0.1, 1.1, math.nan, False, "never"]),
            ("schedule", [1000, "linear"]),
            ("keep_logits", [1, "yes", None]),
            ("token_bucket", [0, -8, 1.5, True, "128"]),
            ("token_capacity", [0, -8, 1.5, True, "128"]),
            ("disable", ["sparsify_ffn", 3, None, ["sparsify_fnn"], [None]]),
            ("strict", [0, "no"]),
            ("dump_dir", [3, ""]),
            ("seed", [-1, 0.5, True, 2**63]),
            ("ignore_index", [None, -100.0, "x"]),
            ("token_selection", ["role", None]),
            ("preserve_weight_mask", ["on", True, None]),
            ("mask_threshold", [0, 1.5, float("nan"), "half", True]),
            ("mask_gradient", ["masked", None]),
            ("channel_selection", ["SVD", 0]),
            ("inductor", [None, ["max_autotune"], {"max_autotunes": True}, {3: 4}]),
        ],
    )
    def test_invalid_value_names_the_option(self, option: str, values: list[Any]) -> None:
        for value in values:
            with pytest.raises(ValueError, match=f"{option}|unknown (pass|inductor option)"):
                SparseLoRAConfig(**{option: value})

    def test_a_bucket_and_a_capacity_exclude_each_other(self) -> None:
        assert SparseLoRAConfig(token_capacity=512).to_options() == {"token_capacity": 512}
        with pytest.raises(ValueError, match="token_bucket and token_capacity exclude each other"):
            SparseLoRAConfig(token_bucket=128, token_capacity=512)

    def test_unknown_pass_is_named_with_the_list(self) -> None:
        with pytest.raises(ValueError, match=r"'sparsify_fnn'.*did you mean 'sparsify_ffn'.*insert_predictors"):
            SparseLoRAConfig(disable=frozenset({"sparsify_fnn"}))

    def test_unknown_inductor_option_is_named_with_a_suggestion(self) -> None:
        assert SparseLoRAConfig(inductor={"max-autotune": True}).inductor == {"max-autotune": True}
        with pytest.raises(ValueError, match=r"'max_autotunes'.*'max_autotune'"):
            SparseLoRAConfig(inductor={"max_autotunes": True})

    @pytest.mark.parametrize("options", [[("preset", "o1")], "o2", SparseLoRAConfig()])
    def test_options_must_be_a_dict(self, options: Any) -> None:
        with pytest.raises(ValueError, match="options must be a dict"):
            SparseLoRAConfig.from_options(options)

    @pytest.mark.parametrize(("start", "end"), [(10, 9), (0.5, 0.4), (0.5, 0), (5, 0.0), (None, 0.04), (1, 0)])
    def test_end_before_start(self, start: Any, end: Any) -> None:
        with pytest.raises(ValueError, match="end_step"):
            SparseLoRAConfig(start_step=start, end_step=end)

    @pytest.mark.parametrize(
        ("start", "end"),
        [(10, 10), (0.4, 0.5), (0, 0), (None, 0), (None, 3), (None, 0.05), (100, 0.5), (0.5, 1), (0, 0.1)],
    )
    def test_end_that_may_lie_behind_the_start(self, start: Any, end: Any) -> None:
        assert SparseLoRAConfig(start_step=start, end_step=end).end_step == end


class TestRelease:
    """`from_pretrained`: the folder that the reference implementation publishes."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        modes = {
            "o1": {"layer_sparsity": {"model.layers.0.mlp": 0, "model.layers.1.mlp": 0.97}},
            "o2": {"layer_sparsity": {"model.layers.1.mlp": 0.99, "model.layers.1.self_attn": 0.75}},
            "mild": {"layer_sparsity": {"model.layers.1.mlp": 0.5}},
        }
        data = {"base_model": "someone/model", "predictor_rank": 6, "modes": modes}
        (tmp_path / "config.json").write_text(json.dumps(data))
        (tmp_path / "model.safetensors").write_bytes(b"")
        return tmp_path

    def test_mode(self, folder: Path) -> None:
        config = SparseLoRAConfig.from_pretrained(folder, mode="o2", start_step=0.1)
        assert config == SparseLoRAConfig(
            preset="o2",
            layer_sparsity={"model.layers.1.mlp": 0.99, "model.layers.1.self_attn": 0.75},
            predictor_rank=6,
            predictor_path=str(folder / "model.safetensors"),
            start_step=0.1,
        )

    def test_default_mode_and_a_mode_that_is_no_preset(self, folder: Path) -> None:
        assert SparseLoRAConfig.from_pretrained(str(folder)).layer_sparsity == {
            "model.layers.0.mlp": 0.0,
            "model.layers.1.mlp": 0.97,
        }
        mild = SparseLoRAConfig.from_pretrained(folder, "mild")
        assert mild.preset == "o1"
        assert mild.layer_sparsity == {"model.layers.1.mlp": 0.5}

    def test_unknown_mode_lists_the_modes(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"'o9'.*'o1', 'o2', 'mild'"):
            SparseLoRAConfig.from_pretrained(folder, mode="o9")

    def test_unknown_override(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="'start'"):
            SparseLoRAConfig.from_pretrained(folder, start=0.1)

    def test_factors_may_be_absent_only_where_they_are_not_wanted(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"no model\.safetensors"):
            SparseLoRAConfig.from_pretrained(folder)
        assert SparseLoRAConfig.from_pretrained(folder, predictor_path=None).predictor_path is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"no config\.json"),
            ("{", "not a JSON file"),
            ("[]", "no 'modes'"),
            ('{"hidden_size": 8}', "no 'modes'"),
            ('{"modes": {"o1": {}}}', "no 'layer_sparsity'"),
            ('{"modes": {"o1": {"layer_sparsity": {"layers.0.mlp": 1.5}}}}', r"layers\.0\.mlp"),
        ],
    )
    def test_other_files(self, folder: Path, content: str | None, message: str) -> None:
        (folder / "config.json").unlink()
        if content is not None:
            (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            SparseLoRAConfig.from_pretrained(folder)

    @pytest.mark.parametrize("path", ["./absent", "a/b/c", "/absent/folder", "~/absent-folder"])
    def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ValueError, match="no such folder"):
            SparseLoRAConfig.from_pretrained(path)

    def test_hub_id_is_downloaded(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")
        asked: list[tuple[str, list[str]]] = []

        def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
            asked.append((repo_id, allow_patterns))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        config = SparseLoRAConfig.from_pretrained("someone/release")
        assert config.predictor_path == str(folder / "model.safetensors")
        assert asked == [("someone/release", ["config.json", "model.safetensors"])]

    def test_hub_without_the_repository_or_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("huggingface_hub")
        # The suite is offline, so the hub's own "not found locally" is what comes back.
        with pytest.raises(ValueError, match="nobody/nothing"):
            SparseLoRAConfig.from_pretrained("nobody/nothing")
        genuine = builtins.__import__

        def without_hub(name: str, *args: Any, **kwargs: Any) -> types.ModuleType:
            if name.partition(".")[0] == "huggingface_hub":
                raise ImportError(name)
            return genuine(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_hub)
        with pytest.raises(ImportError, match="install huggingface_hub"):
            SparseLoRAConfig.from_pretrained("nobody/nothing")


class TestYaml:
    @staticmethod
    def read(tmp_path: Path, text: str, **overrides: Any) -> SparseLoRAConfig:
        path = tmp_path / "sparsity.yaml"
        path.write_text(text)
        return SparseLoRAConfig.from_yaml(path, **overrides)

    def test_file_of_the_first_generation(self, tmp_path: Path) -> None:
        config = self.read(
            tmp_path,
            """
            start_step: 0.05
            mode: "svd_4"
            skip_output_tokens: True
            ffn_sparsity: "ffn=0.99x1"
            qkvo_sparsity: "qkv=0.75x1"
            sparsity:
              layers.0.mlp: 0
              layers.1.mlp: 0.99
              layers.1.self_attn: 0.75
            """,
        )
        sparsity = {"layers.0.mlp": 0.0, "layers.1.mlp": 0.99, "layers.1.self_attn": 0.75}
        assert config == SparseLoRAConfig(layer_sparsity=sparsity, predictor_rank=4, start_step=0.05)

    def test_file_of_the_second_generation(self, tmp_path: Path) -> None:
        text = "layer_sparsity: {layers.1.mlp: 0.9}\npredictor_rank: 6\npath: a/folder\nstart_step: 20\nend_step: 90\n"
        config = self.read(tmp_path, text, strict=True)
        assert config == SparseLoRAConfig(
            layer_sparsity={"layers.1.mlp": 0.9},
            predictor_rank=6,
            predictor_path="a/folder",
            start_step=20,
            end_step=90,
            strict=True,
        )

    def test_dense_mode(self, tmp_path: Path) -> None:
        config = self.read(tmp_path, "mode: dense\nsparsity: {layers.1.mlp: 0.9}\n")
        assert config.layer_sparsity == {"layers.1.mlp": 0.0}

    @pytest.mark.parametrize(
        ("text", "start", "end"),
        [
            ("start_step: 0\nend_step: 1", 0.0, None),  # up to 1 is a fraction; the end of the run is no end
            ("start_step: 1", 1.0, None),
            ("start_step: 2\nend_step: 300.0", 2, 300),
            ("start_step: 0.1\nend_step: 0.5", 0.1, 0.5),
            ("mode: svd_8", None, None),
        ],
    )
    def test_steps(self, tmp_path: Path, text: str, start: Any, end: Any) -> None:
        config = self.read(tmp_path, f"sparsity: {{a.mlp: 0.5}}\n{text}\n")
        assert (config.start_step, config.end_step) == (start, end)
        assert (type(config.start_step), type(config.end_step)) == (type(start), type(end))

    @pytest.mark.parametrize(
        ("text", "options"),
        [
            ("skip_output_tokens: false", {"token_selection": "all_sparse"}),
            ("skip_random_tokens: true", {"token_selection": "random_dense"}),
            ("mlp_seq_avg: true", {"predictor_tokens": "mean"}),
            ("mlp_seq_avg: false", {"predictor_tokens": "all"}),
        ],
    )
    def test_ablations(self, tmp_path: Path, text: str, options: dict[str, Any]) -> None:
        config = self.read(tmp_path, f"sparsity: {{}}\n{text}\n")
        assert config == SparseLoRAConfig(layer_sparsity={}, **options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sparsity: [", "not a YAML file"),
            ("- 1", "not a mapping"),
            ("mode: svd_8", "exactly one of"),
            ("sparsity: {}\nlayer_sparsity: {}", "exactly one of"),
            ("sparsity:", "must map"),
            ("sparsity: {a.mlp: 1.0}", r"a\.mlp"),
            ("sparsity: {}\nsink_tokens: 4", "unknown key 'sink_tokens'.*skip_output_tokens"),
            ("sparsity: {}\nmode: oracle", "mode"),
            ("sparsity: {}\nmode: svd_x", "mode"),
            ("sparsity: {}\nstart_step: 2.5", "start_step"),
            ("sparsity: {}\nstart_step: -1", "start_step"),
            ("sparsity: {}\nend_step: .inf", "end_step"),
            ("sparsity: {}\nend_step: yes", "end_step"),
            ("sparsity: {}\nskip_output_tokens: 1", "skip_output_tokens"),
        ],
    )
    def test_errors(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, text)

    def test_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"absent\.yaml"):
            SparseLoRAConfig.from_yaml(tmp_path / "absent.yaml")


class TestPresetSparsity:
    @staticmethod
    def sparse_blocks(preset: str, kind: Any, count: int) -> tuple[int, ...]:
        return tuple(i for i in range(count) if preset_sparsity(preset, kind, i, count) > 0)

    @pytest.mark.parametrize(
        ("count", "o1", "o2_ffn", "o2_attention"),
        [
            (1, (), (), ()),
            (2, (), (), ()),
            (3, (), (1,), ()),
            (8, (5, 6), (1, 2, 3, 4, 5, 6), (4, 5, 6)),
            (16, tuple(range(9, 15)), tuple(range(2, 15)), tuple(range(7, 15))),
            (32, tuple(range(17, 31)), tuple(range(3, 31)), tuple(range(14, 31))),
            # The borders themselves: 53, 9 and 43 of 100 are inside, 97 is not.
            (100, tuple(range(53, 97)), tuple(range(9, 97)), tuple(range(43, 97))),
        ],
    )
    def test_blocks(self, count: int, o1: Any, o2_ffn: Any, o2_attention: Any) -> None:
        assert self.sparse_blocks("o1", "ffn", count) == self.sparse_blocks("o1", "attention", count) == o1
        assert self.sparse_blocks("o2", "ffn", count) == o2_ffn
        assert self.sparse_blocks("o2", "attention", count) == o2_attention

    def test_values(self) -> None:
        values = [preset_sparsity(preset, kind, 5, 8) for preset in PRESETS for kind in ("ffn", "attention")]  # type: ignore[arg-type]
        assert values == [0.0, 0.0, 0.0, 0.0, 0.97, 0.2, 0.99, 0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("1.mlp", "model.layers.1.mlp", True),
        ("1.mlp", "model.layers.11.mlp", False),
        ("model.layers.1.mlp", "model.layers.1.mlp", True),
        ("model.layers.1.mlp", "base_model.model.model.layers.1.mlp", True),
        ("layers.1", "model.layers.1.mlp", False),
        ("a.model.layers.1.mlp", "model.layers.1.mlp", False),
        ("", "model", False),
        ("", "model.", False),
    ],
)
def test_match_site(pattern: str, name: str, matches: bool) -> None:
    assert match_site(pattern, name) is matches


class TestKeptCount:
    @pytest.mark.parametrize(
        ("n", "sparsity", "kept"),
        [
            (1000, 0.29, 710),  # 1000 * 0.29 == 290.0 here, but
            (100, 0.29, 71),  # 100 * 0.29 == 28.999999999999996
            (100, 0.57, 43),  # 56.99999999999999
            (1000, 0.57, 430),
            (10, 0.7, 3),
            (3, 0.1, 3),
            (14336, 0.99, 144),
            (11008, 0.97, 331),
            (1024, 0.75, 256),
            (8, 0.0, 8),
            (1, 0.99, 1),
            (8, 0.9999999999999999, 1),
            (10**6, 1e-06, 999_999),
            (10**6, np.float64(0.29), 710_000),
        ],
    )
    def test_cases(self, n: int, sparsity: float, kept: int) -> None:
        assert kept_count(n, sparsity) == kept

    def test_every_percentage_is_exact(self) -> None:
        for n in (100, 1000, 4096, 14336):
            for percent in range(100):
                expected = max(1, n - int(Decimal(n) * percent / 100))
                assert kept_count(n, percent / 100) == expected, (n, percent)
