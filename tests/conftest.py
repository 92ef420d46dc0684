"""Fixtures of the suite: pools of gloo ranks, one thread a process, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("EASYCTX_TEST_GPUS", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions are made by it

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n).run(job, *args)` runs `job(rank, n, *args)` on n gloo ranks that live as long as the session."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(autouse=True)
def _rough_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures without a layout and in few points, which take less time, but for tests that use `figures`."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("easyctx.evals.plots.render", _render_roughly)


@pytest.fixture
def figures() -> None:
    """Pictures as users get them."""


def _render_roughly(figure: Any, path: Path) -> None:
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=40)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model with its tokenizer, not to be written to."""
    from tests.eval_helpers import save_tiny_model

    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `recipe_contents` names, not to be written to."""
    from tests.recipe_helpers import recipe_inputs

    return recipe_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def recipe(recipe_folder: Path, tmp_path: Path) -> Any:
    """A recipe of two stages that is read and not run."""
    from easyctx.recipe.read import read_recipe
    from tests.recipe_helpers import recipe_contents, write_recipe

    return read_recipe(write_recipe(tmp_path, recipe_contents(recipe_folder, tmp_path / "out")))
