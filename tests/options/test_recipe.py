"""Recipes as values and as files, and what a configuration accepts of them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oracle import told
from sparse_compile import Recipe, SparseLoRAConfig
from sparse_compile.options.presets import AUTO_DENSE_EVERY
from sparse_compile.options.recipe import DATA_FILE, TENSORS_FILE, AffineMap, SiteRecipe

FILES = (TENSORS_FILE, DATA_FILE)


def affine(rank: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    return AffineMap(*(torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, 5), (4, rank), (4,))))


def rich(seed: int = 0) -> Recipe:
    """Every kind of site there is."""
    sites = {
        "layers.1.mlp": SiteRecipe(affine(3, seed=seed), weights="ab" * 16, error=0.25),
        "layers.0.mlp": SiteRecipe(affine(0, torch.float64)),
        "layers.2.mlp": SiteRecipe(affine(2, torch.bfloat16), error=1.5),
        "layers.2.self_attn": SiteRecipe(sparsity=0.75),
        "layers.3.mlp": SiteRecipe(),
    }
    return Recipe(sites, {"tokens": 12, "loss": 1.25, "of": ["a", None]})


def assert_same_recipe(actual: Recipe, expected: Recipe) -> None:
    assert list(actual.sites) == list(expected.sites) and actual.origin == expected.origin
    for name, site in expected.sites.items():
        found = actual.sites[name]
        assert (found.sparsity, found.weights, found.error) == (site.sparsity, site.weights, site.error)
        assert (found.surrogate is None) == (site.surrogate is None)
        for part in ("q", "u", "bias") if site.surrogate else ():
            got, want = getattr(found.surrogate, part), getattr(site.surrogate, part)
            assert got.dtype == want.dtype and torch.equal(got, want)


def save_raw(folder: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors or {"some": torch.zeros(2)}, folder / TENSORS_FILE, metadata)
    return folder


def metadata_of(recipe: Recipe, tmp_path: Path) -> dict[str, Any]:
    recipe.save(tmp_path / "of")
    return json.loads((tmp_path / "of" / DATA_FILE).read_text())


class TestValue:
    def test_equal_where_all_is_equal_whatever_the_order_and_the_origin(self) -> None:
        recipe = rich()
        turned = Recipe(dict(reversed(recipe.sites.items())), {"of": "elsewhere"}, "a folder")
        assert recipe == rich() == turned and len({recipe, rich(), turned}) == 1

    @pytest.mark.parametrize(
        "other",
        [
            rich(seed=1),
            rich().without("layers.3.mlp"),
            Recipe(rich().sites | {"layers.3.mlp": SiteRecipe(sparsity=0.1)}),
            Recipe(rich().sites | {"layers.1.mlp": SiteRecipe(affine(3), weights="cd" * 16, error=0.25)}),
            Recipe(rich().sites | {"layers.0.mlp": SiteRecipe(affine(0, torch.float64, seed=1))}),
            Recipe({}),
            "a recipe",
        ],
    )
    def test_another_recipe_is_another(self, other: Any) -> None:
        assert rich() != other and hash(rich()) != hash(other)

    def test_the_last_bit_of_a_map_tells(self) -> None:
        first = affine()
        second = AffineMap(first.q, first.u, first.bias.nextafter(torch.tensor(9.0)))
        assert Recipe({"mlp": SiteRecipe(first)}) != Recipe({"mlp": SiteRecipe(second)})

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda recipe: pickle.loads(pickle.dumps(recipe))])
    def test_copies_are_equal(self, duplicate: Any) -> None:
        recipe = rich()
        for _ in range(2):
            other = duplicate(recipe)
            assert_same_recipe(other, recipe)
            assert other == recipe and hash(other) == hash(recipe)

    def test_later_changes_of_the_arguments_do_not_reach_it(self) -> None:
        sites, origin = dict(rich().sites), {"tokens": 12}
        recipe = Recipe(sites, origin)
        del sites["layers.0.mlp"]
        origin.clear()
        assert recipe == rich() and recipe.origin == {"tokens": 12}

    def test_without_leaves_sites_out(self) -> None:
        recipe = rich()
        less = recipe.without("layers.0.mlp", "layers.3.mlp")
        assert list(less.sites) == ["layers.1.mlp", "layers.2.mlp", "layers.2.self_attn"]
        assert less.origin == recipe.origin and recipe == rich() and recipe.without() == recipe
        with pytest.raises(ValueError, match=r"'mlp'.*layers\.1\.mlp"):
            recipe.without("layers.0.mlp", "mlp")

    def test_sparsities_make_a_recipe(self) -> None:
        recipe = Recipe.of_sparsities({"mlp": 0.5, "self_attn": 0.0})
        assert {name: (site.surrogate, site.sparsity) for name, site in recipe.sites.items()} == {
            "mlp": (None, 0.5),
            "self_attn": (None, 0.0),
        }

    @pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan")])
    def test_a_sparsity_out_of_range_is_refused(self, sparsity: float) -> None:
        with pytest.raises(ValueError, match="sparsity"):
            SiteRecipe(sparsity=sparsity)

    @pytest.mark.parametrize(
        "shapes", [((2, 5), (4, 3), (4,)), ((2, 5), (4, 2), (5,)), ((5,), (4, 2), (4,)), ((2, 5), (4, 2), (4, 1))]
    )
    def test_maps_of_other_shapes_are_refused(self, shapes: Any) -> None:
        with pytest.raises(ValueError, match="affine map has q"):
            AffineMap(*map(torch.zeros, shapes))

    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_maps_that_are_not_finite_are_refused(self, value: float, part: int) -> None:
        tensors = [torch.zeros(2, 5), torch.zeros(4, 2), torch.zeros(4)]
        tensors[part].view(-1)[1] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            AffineMap(*tensors)

    def test_a_map_is_what_it_says(self) -> None:
        found, x = affine(dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(found(x), torch.einsum("or,ri,bsi->bso", found.u, found.q, x) + found.bias)


class TestFiles:
    @pytest.mark.parametrize("recipe", [rich(), Recipe({}), Recipe({"mlp": SiteRecipe(affine(0, torch.bfloat16))})])
    def test_what_is_read_is_what_was_saved(self, recipe: Recipe, tmp_path: Path) -> None:
        for folder in (tmp_path / "made" / "here", str(tmp_path / "text")):
            recipe.save(folder)
            with told() as messages:
                found = Recipe.load(folder)
            assert_same_recipe(found, recipe)
            assert found == recipe and found.folder == str(folder) and messages == []
            assert sorted(each.name for each in Path(folder).iterdir()) == sorted(FILES)
        # What was read is saved as it was.
        found.save(tmp_path / "again")
        assert (tmp_path / "again" / TENSORS_FILE).read_bytes() == (tmp_path / "text" / TENSORS_FILE).read_bytes()

    def test_trained_tensors_and_views_are_saved_as_values(self, tmp_path: Path) -> None:
        whole = torch.randn(10, 10, requires_grad=True)
        Recipe({"mlp": SiteRecipe(AffineMap(whole[:3, ::2], whole.T[:4, :3], whole[0, :4]))}).save(tmp_path)
        found = Recipe.load(tmp_path).sites["mlp"].surrogate
        assert found is not None and torch.equal(found.u, whole.detach().T[:4, :3]) and not found.q.requires_grad

    def test_two_sites_may_have_one_map(self, tmp_path: Path) -> None:
        recipe = Recipe(dict.fromkeys(("layers.0.mlp", "layers.1.mlp"), SiteRecipe(affine())))
        recipe.save(tmp_path)
        assert_same_recipe(Recipe.load(tmp_path), recipe)

    def test_a_later_save_replaces_the_earlier(self, tmp_path: Path) -> None:
        rich().save(tmp_path)
        Recipe.of_sparsities({"mlp": 0.5}).save(tmp_path)
        assert Recipe.load(tmp_path) == Recipe.of_sparsities({"mlp": 0.5})

    @pytest.mark.parametrize("survivor", ["old", "new"])
    def test_a_killed_save_leaves_the_old_or_the_new(
        self, survivor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It dies when it replaces the first file, or the second."""
        rich(0).save(tmp_path)
        replace, fatal = Path.replace, FILES[survivor == "new"]

        def dies(self: Path, target: Path) -> Path:
            if Path(target).name == fatal:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            rich(1).save(tmp_path)
        monkeypatch.undo()
        with told():
            assert_same_recipe(Recipe.load(tmp_path), rich(int(survivor == "new")))
        assert sorted(each.name for each in tmp_path.iterdir()) == sorted(FILES)
        rich(1).save(tmp_path)
        assert Recipe.load(tmp_path) == rich(1)

    def test_a_copy_that_was_edited_is_told_of_and_not_used(self, tmp_path: Path) -> None:
        rich().save(tmp_path)
        copy_for_people = tmp_path / DATA_FILE
        copy_for_people.write_text(copy_for_people.read_text().replace("0.75", "0.5"))
        with told() as messages:
            assert Recipe.load(tmp_path) == rich()
        assert len(messages) == 1 and str(copy_for_people) in messages[0] and "without" in messages[0]

    @pytest.mark.parametrize("content", [None, b"", b"\xff not json"])
    def test_a_copy_that_is_gone_misleads_nobody(self, content: bytes | None, tmp_path: Path) -> None:
        rich().save(tmp_path)
        (tmp_path / DATA_FILE).unlink()
        if content is not None:
            (tmp_path / DATA_FILE).write_bytes(content)
        with told() as messages:
            assert Recipe.load(tmp_path) == rich()
        assert messages == []

    def test_absent_folders_and_files_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "empty").mkdir()
        for folder in ("absent", "empty", "file"):
            with pytest.raises(ValueError, match=f"{tmp_path / folder}.*"):
                Recipe.load(tmp_path / folder)

    @pytest.mark.parametrize("keep", [0, 5, 60, -1])
    def test_a_file_that_is_cut_off_is_named(self, keep: int, tmp_path: Path) -> None:
        rich().save(tmp_path)
        file = tmp_path / TENSORS_FILE
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=str(file)):
            Recipe.load(tmp_path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"recipe": "{"}, {"recipe": "[]"}, {"recipe": "3"}])
    def test_a_file_of_something_else_is_named(self, metadata: dict[str, str] | None, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=str(tmp_path / TENSORS_FILE)):
            Recipe.load(save_raw(tmp_path, metadata))

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_another_format_is_named(self, version: Any, tmp_path: Path) -> None:
        data = {"format": version, "something": "else"}
        with pytest.raises(ValueError, match=rf"{tmp_path / TENSORS_FILE}.*format {version!r}.*calibrate again"):
            Recipe.load(save_raw(tmp_path, {"recipe": json.dumps(data)}))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"sparsity": 1.0}, "sparsity"),
            ({"sparsity": "half"}, ""),
            ("gone", ""),
            ([], ""),
        ],
    )
    def test_damaged_entries_are_named(self, change: Any, reason: str, tmp_path: Path) -> None:
        data = metadata_of(rich().without("layers.0.mlp", "layers.2.mlp"), tmp_path)
        entry = data["sites"]["layers.1.mlp"]
        data["sites"]["layers.1.mlp"] = entry | change if isinstance(change, dict) else change
        found = affine(3)
        parts = {f"layers.1.mlp.{part}": getattr(found, part) for part in ("q", "u", "bias")}
        folder = save_raw(tmp_path / "damaged", {"recipe": json.dumps(data)}, **parts)
        with pytest.raises(ValueError, match=rf"{folder / TENSORS_FILE}.*{reason}"):
            Recipe.load(folder)

    @pytest.mark.parametrize(
        ("parts", "reason"),
        [
            ({"q": torch.zeros(3, 5), "u": torch.zeros(4, 3)}, "lacks.*bias"),
            ({"q": torch.zeros(3, 5), "u": torch.zeros(4, 2), "bias": torch.zeros(4)}, "affine map has q"),
            ({"q": torch.zeros(3, 5), "u": torch.zeros(4, 3), "bias": torch.full((4,), torch.nan)}, "NaN"),
        ],
    )
    def test_damaged_maps_are_named(self, parts: dict[str, torch.Tensor], reason: str, tmp_path: Path) -> None:
        data = metadata_of(Recipe({"mlp": SiteRecipe(affine(3))}), tmp_path)
        tensors = {f"mlp.{part}": tensor for part, tensor in parts.items()}
        folder = save_raw(tmp_path / "damaged", {"recipe": json.dumps(data)}, **tensors)
        with pytest.raises(ValueError, match=rf"{folder / TENSORS_FILE}.*{reason}"):
            Recipe.load(folder)


class TestOption:
    def test_a_folder_is_read_at_once_and_is_plain(self, tmp_path: Path) -> None:
        rich().save(tmp_path)
        for given in (tmp_path, str(tmp_path)):
            config = SparseLoRAConfig(recipe=given)  # type: ignore[arg-type]
            assert config.recipe == rich() and config.to_options() == {"recipe": str(tmp_path)}
            assert SparseLoRAConfig.from_options(config.to_options()) == config

    def test_a_recipe_is_handed_on_as_it_is(self) -> None:
        recipe = rich()
        config = SparseLoRAConfig(recipe=recipe, surrogate_gradient="detached")
        assert config.to_options() == {"recipe": recipe, "surrogate_gradient": "detached"}
        assert SparseLoRAConfig.from_options(config.to_options()) == config

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_compare_and_hash_alike(self, duplicate: Any) -> None:
        config = SparseLoRAConfig(recipe=rich())
        other = duplicate(config)
        assert other == config == SparseLoRAConfig(recipe=rich()) and hash(other) == hash(config)
        assert len({config, other, SparseLoRAConfig(recipe=rich(1)), SparseLoRAConfig()}) == 3

    def test_a_recipe_and_a_schedule_of_sparsities_exclude_each_other(self) -> None:
        with pytest.raises(ValueError, match="recipe and layer_sparsity"):
            SparseLoRAConfig(recipe=rich(), layer_sparsity={"mlp": 0.5})

    @pytest.mark.parametrize("value", ["", 3, True, b"bytes", {"mlp": 0.5}, SiteRecipe()])
    def test_what_is_no_recipe_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match="recipe"):
            SparseLoRAConfig(recipe=value)

    def test_a_folder_without_a_recipe_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"{tmp_path / 'absent'}.*no recipe"):
            SparseLoRAConfig(recipe=tmp_path / "absent")  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", ["none", "", None, True])
    def test_another_gradient_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"surrogate_gradient.*exact.*detached"):
            SparseLoRAConfig(surrogate_gradient=value)

    def test_what_a_site_becomes_is_told_for_reports(self) -> None:
        assert SparseLoRAConfig(recipe=rich()).site_sparsity == {
            "layers.1.mlp": 1.0,
            "layers.0.mlp": 1.0,
            "layers.2.mlp": 1.0,
            "layers.2.self_attn": 0.75,
            "layers.3.mlp": 0.0,
        }
        assert [SparseLoRAConfig(**each).site_option for each in ({"recipe": rich()}, {})] == ["recipe", ""]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Recipe({"layers.0.mlp": 3}),  # type: ignore[dict-item]
        lambda: Recipe({3: SiteRecipe()}),  # type: ignore[dict-item]
        lambda: SiteRecipe(sparsity="0.5"),  # type: ignore[arg-type]
        lambda: SiteRecipe(sparsity=True),
        lambda: SiteRecipe(sparsity=float("nan")),
        lambda: SiteRecipe(AffineMap(torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(2)), sparsity=0.5),
    ],
    ids=["no site", "no name", "a text", "a bool", "NaN", "a map and a sparsity"],
)
def test_what_is_no_recipe_is_refused_at_once(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="site"):
        wrong()


SCHEDULES: list[tuple[int | None, float | int | None]] = [
    (None, None),
    (2, None),
    (None, 0),
    (8, 0.85),
    (3, 1.0),
    (16, 400),
]


class TestSchedule:
    @pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
    def test_it_is_saved_and_read(self, schedule: tuple[Any, Any], tmp_path: Path) -> None:
        recipe = rich().with_schedule(*schedule)
        recipe.save(tmp_path)
        found = Recipe.load(tmp_path)
        assert_same_recipe(found, rich())
        assert (found.dense_every, found.end_step) == schedule and type(found.end_step) is type(schedule[1])
        assert found == recipe and (found == rich()) == (schedule == (None, None))
        (copy_for_people,) = [json.loads((tmp_path / DATA_FILE).read_text())]
        said = {"dense_every": schedule[0], "end_step": schedule[1]}
        assert said.items() & copy_for_people.items() == {each for each in said.items() if each[1] is not None}
        assert len(said.keys() & copy_for_people.keys()) == sum(each is not None for each in schedule)

    def test_a_file_that_says_nothing_of_it_is_read(self, tmp_path: Path) -> None:
        """Recipes of before had no such fields, and have the digest that they had."""
        data = metadata_of(Recipe.of_sparsities({"mlp": 0.5}), tmp_path)
        assert data == {
            "format": 1,
            "origin": {},
            "sites": {"mlp": {"rank": None, "sparsity": 0.5, "error": None, "weights": ""}},
        }
        found = Recipe.load(save_raw(tmp_path / "old", {"recipe": json.dumps(data)}))
        assert (found.dense_every, found.end_step) == (None, None) and found == Recipe.of_sparsities({"mlp": 0.5})

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dense_every": 1}, "dense_every must be at least 2, got 1"),
            ({"dense_every": 2.5}, "dense_every must be an integer, got 2.5"),
            ({"dense_every": "8"}, "dense_every must be an integer, got '8'"),
            ({"dense_every": True}, "dense_every must be an integer, got True"),
            ({"end_step": -1}, "end_step must be at least 0, got -1"),
            ({"end_step": 1.5}, r"end_step as a float is a fraction in \[0, 1\]"),
            ({"end_step": "never"}, "end_step must be a number, got 'never'"),
            ({"end_step": float("nan")}, r"end_step as a float is a fraction in \[0, 1\]"),
        ],
        ids=str,
    )
    def test_what_is_none_is_refused(self, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"^{reason}"):
            rich().with_schedule(**change)
        data = metadata_of(Recipe.of_sparsities({"mlp": 0.5}), tmp_path) | change
        folder = save_raw(tmp_path / "damaged", {"recipe": json.dumps(data)})
        with pytest.raises(ValueError, match=f"^{folder / TENSORS_FILE}: {reason}"):
            Recipe.load(folder)

    def test_a_recipe_without_a_site_keeps_it(self) -> None:
        recipe = rich().with_schedule(8, 0.5).without("layers.0.mlp")
        assert (recipe.dense_every, recipe.end_step) == (8, 0.5)

    @pytest.mark.parametrize(
        ("recipe", "options", "expected"),
        [
            ((None, None), {}, (None, None)),
            ((4, 0.75), {}, (4, 0.75)),
            ((4, 0.75), {"dense_every": 2}, (2, 0.75)),
            ((4, 0.75), {"end_step": 0.5}, (4, 0.5)),
            ((4, 0.75), {"end_step": 0, "start_step": 0}, (4, 0)),
            ((None, None), {"dense_every": 2, "end_step": 30}, (2, 30)),
            ((None, None), {"context_exit": 0.5}, (AUTO_DENSE_EVERY, None)),
            ((4, None), {"context_exit": 0.5}, (4, None)),
            ((4, 0.75), {"preset": "auto"}, (4, 0.75)),
            ((None, None), {"preset": "auto"}, (None, None)),
        ],
        ids=str,
    )
    def test_the_option_comes_first_then_the_recipe_then_the_preset(
        self, recipe: tuple[Any, Any], options: dict[str, Any], expected: tuple[Any, Any]
    ) -> None:
        config = SparseLoRAConfig(recipe=rich().with_schedule(*recipe), **options)
        assert (config.dense_period, config.dense_from) == expected

    def test_an_end_before_the_start_is_refused(self) -> None:
        recipe = rich().with_schedule(end_step=10)
        SparseLoRAConfig(recipe=recipe, start_step=10)
        SparseLoRAConfig(recipe=recipe, start_step=20, end_step=30)
        with pytest.raises(ValueError, match="end_step 10 of the recipe lies before start_step 20"):
            SparseLoRAConfig(recipe=recipe, start_step=20)
