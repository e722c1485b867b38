"""Similarity artifacts: the merge tree, what is stored, what is refused, and that the stored pass is all they read."""

import ast

import numpy as np
import pytest
import torch
from similarity_cases import broken, one_entry, stream

from compression_dags.calibration.activations import Activations, profile_activations
from compression_dags.calibration.corpora import TokenBlocks
from compression_dags.calibration.statistics import HIDDEN_STATES
from compression_dags.calibration.streaming import DecoderStream
from compression_dags.checkpoints.reader import Checkpoint
from compression_dags.errors import InputError
from compression_dags.paths import PROJECT
from compression_dags.provenance.plots import merge_tree_png
from compression_dags.provenance.resume import ResumePoint
from compression_dags.similarity import cka, npib
from compression_dags.similarity.evidence import read_evidence
from compression_dags.similarity.merge_tree import merge_tree
from compression_dags.similarity.tables import write_similarity


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of products of tiny matrices: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the merge tree ---------------------------------------------------------------------------------------------

TOY = np.array([[1, 0.5, 0.2, 0.1], [0.5, 1, 0.5, 0.3], [0.2, 0.5, 1, 0.4], [0.1, 0.3, 0.4, 1.0]])


def test_merge_tree_takes_the_rear_of_equals_and_mean_linkage():
    tree = merge_tree(TOY)
    assert [(list(m.first), list(m.second)) for m in tree] == [([1], [2]), ([1, 2], [3]), ([0], [1, 2, 3])]
    assert [m.value for m in tree] == pytest.approx([0.5, 0.35, 0.8 / 3])
    assert [m.overlaps for m in tree] == [1, 1, 0]  # 0-1 ties; then 0 with 1+2 is also at 0.35
    wide = merge_tree(TOY, TOY - 0.2, TOY + 0.2, count=1)
    assert len(wide) == 1 and wide[0].overlaps == 2 and wide[0].low == pytest.approx(0.3)
    assert merge_tree(TOY, allowed=lambda a, b: a.start >= 2, count=3)[0].first == range(2, 3)


def test_merge_tree_plot_is_deterministic():
    tree = [(m.first, m.second, m.value) for m in merge_tree(TOY)]
    assert merge_tree_png(TOY, tree, "layer", "S") == merge_tree_png(TOY.copy(), tree, "layer", "S")
    assert merge_tree_png(TOY, tree[:1], "layer", "S") != merge_tree_png(TOY, tree, "layer", "S")
    assert merge_tree_png(np.ones((1, 1)), [], "layer", "S").startswith(b"\x89PNG")


# -- stored activations -----------------------------------------------------------------------------------------


def stored(directory, hidden, sequences=16, first=None):
    """A calibration pass as it lies on disk, without any model: (L+1, n, d) states."""
    depths, count, _ = hidden.shape
    sampled = torch.stack([torch.arange(count) * sequences // count, torch.arange(count)], dim=1)
    influence = [torch.full((depths - 1,), 0.1, dtype=torch.float64) for _ in range(2)]
    angular = [torch.zeros(depths, depths, dtype=torch.float64) for _ in range(2)]
    first = (hidden[:, :128] if first is None else first).clone()
    directory.mkdir(exist_ok=True)
    Activations(*influence, *angular, hidden.clone(), sampled, first, {}, count).save(directory)
    return directory


def written(tmp_path, metric, activations, name="out"):
    (tmp_path / name).mkdir()
    return write_similarity(metric, activations, tmp_path / name), tmp_path / name


def test_npib_artifact(tmp_path):
    hidden = stream(5, 200)
    metadata, directory = written(tmp_path, "npib", stored(tmp_path / "pass", hidden))
    arrays = read_evidence({"npib": directory}).similarity
    torch.testing.assert_close(torch.from_numpy(arrays["npib"]), npib.npib(hidden[1:]))  # outputs, before the norm
    np.testing.assert_allclose(arrays["npib_released"], npib.released(hidden[:-1]).numpy())  # inputs, as the code
    np.testing.assert_allclose(arrays["npib_ksg"], npib.npib(hidden[1:], "ksg").numpy())
    np.testing.assert_allclose(arrays["npib_gaussian_copula"], npib.npib(hidden[1:], "gaussian-copula").numpy())
    assert np.all(arrays["npib_low"] <= arrays["npib"]) and np.all(arrays["npib"] <= arrays["npib_high"])
    assert arrays["npib_sigma"].shape == (4,) and arrays["npib_samples"] == [200] and arrays["npib_bins"] == [3]
    best = int(np.diagonal(arrays["npib"], 1).argmax())
    assert metadata["closest_layers"] == f"{best}-{best + 1}"
    assert metadata["similarity"] == pytest.approx(arrays["npib"][best, best + 1])
    assert metadata["low"] <= metadata["similarity"] <= metadata["high"]
    above = np.diagonal(arrays["npib_high"], 1) >= metadata["low"]
    assert metadata["not_told_apart"] == above.sum() - 1
    assert (
        metadata["tokens"] == 200 and metadata["npib_ksg"] == "200 tokens" and metadata["npib_released"] == "57 tokens"
    )


def test_cka_artifact(tmp_path):
    hidden = stream(5, 120)
    metadata, directory = written(tmp_path, "cka", stored(tmp_path / "pass", hidden))
    arrays = read_evidence({"cka": directory}).similarity
    np.testing.assert_allclose(arrays["cka"], cka.cka(hidden[1:]).numpy())
    assert set(arrays) == {"cka", "cka_low", "cka_high"} and metadata["tokens"] == 120


@pytest.mark.parametrize("metric", ["npib", "cka"])
def test_same_states_same_bytes(tmp_path, metric):
    activations = stored(tmp_path / "pass", stream(4, 100))
    folders = [written(tmp_path, metric, activations, name)[1] for name in "ab"]
    for file in ("similarity.safetensors", "plot.png"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1


def test_what_an_extra_estimator_cannot_give_is_left_out_and_said(tmp_path):
    """A short calibration, or norms for which σ = 8 degenerates, must not fail recipes that read neither."""
    hidden = stream(4, 40)
    metadata, directory = written(tmp_path, "npib", stored(tmp_path / "pass", hidden, first=hidden[:, :20]))
    arrays = read_evidence({"npib": directory}).similarity
    assert "npib" in arrays and "npib_ksg" not in arrays and "npib_released" not in arrays
    assert "51" in metadata["npib_ksg"] and "sequence 0 has 20 tokens" in metadata["npib_released"]
    metadata, _ = written(tmp_path, "npib", stored(tmp_path / "large", 1e9 * stream(4, 64)), "large_out")
    assert "layer 0" in metadata["npib_released"] and "spectral gap" in metadata["npib_released"]


@pytest.mark.parametrize("tokens", [32, 64])
def test_small_calibrations_work(tmp_path, tokens):
    metadata, _ = written(tmp_path, "npib", stored(tmp_path / "pass", stream(4, tokens)))
    assert metadata["bins"] == 2


@pytest.mark.parametrize(
    ("metric", "hidden", "says"),
    [
        ("npib", stream(3, 31), "n = 31"),
        ("npib", one_entry(torch.nan), "layer 1: .*not finite"),  # state 2 is the output of layer 1
        ("cka", broken(1, 3.0), "layer 0: .*constant"),
        ("hsic", stream(3), "allowed: block_influence, angular, npib, cka"),
    ],
)
def test_unusable_states_are_refused(tmp_path, metric, hidden, says):
    with pytest.raises(InputError, match=says):
        written(tmp_path, metric, stored(tmp_path / "pass", hidden))
    assert not list((tmp_path / "out").iterdir())


def test_similarity_reads_the_stored_states_alone(tmp_path, monkeypatch):
    """No module of it can reach a model, and a machine whose checkpoints cannot be read computes it all the same."""
    for name in ("diffusion", "npib", "ksg", "cka", "resampling", "evidence"):
        tree = ast.parse((PROJECT / "compression_dags" / "similarity" / f"{name}.py").read_text())
        imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not [m for m in imported if m.endswith(("streaming", "reader")) or m.startswith("transformers")], name

    def unreadable(*_):
        raise AssertionError("a model was read")

    monkeypatch.setattr(Checkpoint, "__init__", unreadable)
    monkeypatch.setattr(DecoderStream, "__init__", unreadable)
    activations = stored(tmp_path / "pass", stream(3, 80))
    for metric in ("block_influence", "angular", "npib", "cka"):
        written(tmp_path, metric, activations, metric)


def test_first_tokens_are_those_of_sequence_zero(tiny_model, tmp_path):
    """The same at every batch size and behind any padding, through a kill, and on disk."""
    from safetensors.torch import load_file

    checkpoint = Checkpoint(tiny_model("llama"))
    ids = np.random.default_rng(0).integers(3, 512, (4, 160)).astype(np.int32)
    blocks = TokenBlocks(ids, np.array([150, 160, 20, 160], dtype=np.int32), 4)
    found = profile_activations(DecoderStream(checkpoint, batch_size=4), blocks, samples=10_000)
    assert found.first_tokens.shape == (5, 128, 64)
    mine = (found.sampled[:, 0] == 0) & (found.sampled[:, 1] < 128)
    assert torch.equal(found.first_tokens, found.hidden[:, mine])

    single = profile_activations(DecoderStream(checkpoint, batch_size=1, resident=False), blocks)
    torch.testing.assert_close(single.first_tokens, found.first_tokens, rtol=1e-4, atol=1e-5)
    short = TokenBlocks(ids, np.array([60, 160, 20, 160], dtype=np.int32), 4)
    ids_changed = TokenBlocks(ids.copy(), short.lengths, 4)
    ids_changed.ids[0, 60:] = 7
    a, b = (profile_activations(DecoderStream(checkpoint), x) for x in (short, ids_changed))
    assert a.first_tokens.shape[1] == 60 and torch.equal(a.first_tokens, b.first_tokens)
    torch.testing.assert_close(a.first_tokens, found.first_tokens[:, :60], rtol=1e-4, atol=1e-5)

    stream_, applied = DecoderStream(checkpoint), []
    apply = stream_.apply

    def dies(module, index, batch, hidden=None):
        if index == 2:
            raise KeyboardInterrupt
        return apply(module, index, batch, hidden)

    stream_.apply = dies
    with pytest.raises(KeyboardInterrupt):
        profile_activations(stream_, blocks, samples=10_000, resume=ResumePoint(tmp_path, {}, every_seconds=0))
    stream_.apply = lambda m, i, b, h=None: (applied.append(i), apply(m, i, b, h))[1]
    resumed = profile_activations(stream_, blocks, samples=10_000, resume=ResumePoint(tmp_path, {}))
    assert min(applied) == 2
    torch.testing.assert_close(resumed.first_tokens, found.first_tokens, rtol=1e-4, atol=1e-5)
    resumed.save(tmp_path)
    assert torch.equal(load_file(tmp_path / HIDDEN_STATES)["first_tokens"], resumed.first_tokens)
