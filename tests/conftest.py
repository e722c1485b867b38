"""Fixtures shared by all rooms. Nothing here touches the network or imports torch before a test needs it."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compression_dags.resources.model_hub import ModelHub

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch reads it when first imported: the lazy form of torch.set_num_threads. Two workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"


def _cuda_driver() -> bool:
    """Whether CUDA's driver is installed, asked without torch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# Without a GPU the kernels run in Triton's interpreter. Triton reads the variable when it is first imported.
if importlib.util.find_spec("triton") is not None and not _cuda_driver():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Files that take long because they start processes or run whole graphs: first, so that no worker ends alone with one.
LONG = ("cli", "truth", "killed", "standing", "graph", "readers", "planning", "fingerprints", "distillation", "wheel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped without a GPU; a kernel alone also runs in Triton's interpreter."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    interpreted = marker.kwargs.get("interpreted", False)
    if not interpreted:
        pytest.skip("needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, and a CUDA device or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command line writes `--home` and `--debug` into the environment; a test must not leave them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again after every few thousand new objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories260K: Llama, 5 layers, hidden 64, vocabulary 512, float32."""
    return MODELS / "stories260k"


@pytest.fixture(scope="session")
def novella() -> Path:
    """novella-13m: Llama, 16 layers, hidden 256, vocabulary 4096, float16."""
    return MODELS / "novella-13m"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **options)`: a directory made once a session for equal options. Read it, never write it."""
    from models import tiny

    made: dict[tuple, Path] = {}

    def make(family: str, **options) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            made[key] = tiny(family, tmp_path_factory.mktemp(family) / family, **options)
        return made[key]

    return make


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> Path:
    """A copy of stories260K to damage."""
    return Path(shutil.copytree(stories, tmp_path / "model"))


@pytest.fixture
def hub(tmp_path: Path) -> ModelHub:
    return ModelHub(home=str(tmp_path / "home"))
