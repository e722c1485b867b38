"""Tasks and their names, the perplexity protocol against a plain reference, lm-eval from local folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from compression_dags.errors import InputError, IntegrityError
from compression_dags.evaluation import HarnessTask, PerplexityTask, check_dense, data_digest, load_tasks
from compression_dags.paths import PROJECT

STORIES = PROJECT / "models" / "stories260k"
TEXT = PROJECT / "data" / "heldout" / "stories.jsonl"


@pytest.fixture(scope="module")
def book():
    return load_tasks(PROJECT / "recipes" / "evaluation.yaml")


@pytest.fixture(scope="module")
def stories():
    import torch
    from transformers import AutoTokenizer

    from compression_dags.checkpoints.gate import load_stock

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for one another
    yield load_stock(STORIES), AutoTokenizer.from_pretrained(STORIES)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text():
    return PerplexityTask(name="s", file=str(TEXT)).read()[:8_000]


class NoBos:
    """A tokenizer that adds no special tokens."""

    bos_token_id = None

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]}


def naive(model, ids, window, bos):
    """The protocol in plain words: one window at a time, all logits at once. Mean NLL of each window."""
    import torch

    body = window - (bos is not None)
    nlls = []
    for start in range(0, len(ids) - body + 1, body):
        row = torch.tensor([([] if bos is None else [bos]) + ids[start : start + body]])
        with torch.no_grad():
            logp = torch.log_softmax(model(row).logits[0].float(), dim=-1)
        nlls.append(-logp[:-1].gather(1, row[0, 1:, None]).double().mean().item())
    return nlls


# Perplexity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bos", [True, False])
def test_perplexity_equals_the_plain_formula(stories, text, with_bos):
    from compression_dags.evaluation.perplexity import perplexity

    model, tokenizer = stories
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = naive(model, ids, 128, tokenizer.bos_token_id if with_bos else None)
    result = perplexity(model, tokenizer if with_bos else NoBos(tokenizer), text, window=128)
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5)
    assert result.metrics["perplexity@128"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert result.metrics["nll_stderr@128"] == pytest.approx(np.std(expected, ddof=1) / math.sqrt(len(expected)))
    assert result.metrics["bos"] == with_bos
    assert result.metrics["windows"] == result.metrics["windows_available"] == len(ids) // (128 - with_bos)
    assert result.metrics["tokens"] == 127 * len(expected)


def test_batch_size_and_chunks_do_not_matter(stories, text, monkeypatch):
    from compression_dags.evaluation import perplexity as module

    reference = module.perplexity(*stories, text, window=100, batch_size=1)
    for size in (3, 16):
        other = module.perplexity(*stories, text, window=100, batch_size=size)
        np.testing.assert_allclose(other.nll, reference.nll, rtol=1e-5)
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 512 * 7)  # seven rows of logits a chunk
    np.testing.assert_allclose(module.perplexity(*stories, text, window=100).nll, reference.nll, rtol=1e-5)


@pytest.mark.parametrize("family", ["plain", "squashed"])
def test_models_with_other_logits_than_their_head_gives(stories, family):
    """A random model with an untied head, and Gemma 2, which squashes its logits after the head."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    from compression_dags.evaluation.perplexity import perplexity

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"tie_word_embeddings": False}
    torch.manual_seed(0)
    if family == "plain":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    else:
        model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, final_logit_softcapping=0.5))
    model = model.eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    tokenizer, text = stories[1], "Once upon a time there was a cat. " * 40
    result = perplexity(model, tokenizer, text, window=2048)
    expected = naive(model, tokenizer(text, add_special_tokens=False)["input_ids"], 64, tokenizer.bos_token_id)
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5)
    assert "perplexity@64" in result.metrics  # clipped to the context


def test_windows_are_spread_evenly_and_counted(stories, text):
    from compression_dags.evaluation.perplexity import perplexity

    everything = perplexity(*stories, text, window=128)
    available = everything.metrics["windows_available"]
    some = perplexity(*stories, text, window=128, max_windows=10)
    assert some.window.tolist() == [i * available // 10 for i in range(10)]
    np.testing.assert_allclose(some.nll, everything.nll[some.window], rtol=1e-5)
    many = perplexity(*stories, text, window=128, max_windows=10**6)
    assert many.metrics == everything.metrics
    frame = some.frame()
    assert list(frame) == ["window", "nll", "tokens"] and len(frame) == 10 and set(frame["tokens"]) == {127}


def test_short_texts_and_broken_models(stories):
    import torch

    from compression_dags.evaluation.perplexity import perplexity

    model, tokenizer = stories
    with pytest.raises(InputError, match="empty"):
        perplexity(model, tokenizer, " \n", window=64)
    body = len(tokenizer("A cat sat.", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=f"has {body} tokens; one window needs {body + 1}"):
        perplexity(model, tokenizer, "A cat sat.", window=body + 2)
    exact = perplexity(model, tokenizer, "A cat sat.", window=body + 1)
    assert exact.metrics["windows"] == 1 and f"nll_stderr@{body + 1}" not in exact.metrics
    model.model.norm.weight.data, kept = torch.full((64,), torch.nan), model.model.norm.weight.data
    try:
        with pytest.raises(IntegrityError, match="non-finite"):
            perplexity(model, tokenizer, "A cat sat.", window=body + 1)
    finally:
        model.model.norm.weight.data = kept


def test_known_dense_perplexity(stories, book):
    from compression_dags.evaluation.perplexity import perplexity

    task = book.tasks["heldout_stories"]
    metrics = perplexity(*stories, task.read(), window=task.window, max_windows=task.max_windows).metrics
    assert check_dense("stories260k", task.name, metrics)
    worse = {**metrics, "perplexity@512": metrics["perplexity@512"] * 1.2}
    with pytest.raises(IntegrityError, match="stories260k has perplexity@512"):
        check_dense("stories260k", task.name, worse)
    assert not check_dense("stories260k", task.name, {**worse, "windows": 3})  # not comparable
    assert not check_dense("mine", task.name, worse)


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_shipped_tasks_resolve(book):
    assert [task.name for task in book.resolve(["heldout", "piqa", "heldout_c4"])] == [
        *book.suites["heldout"],
        "piqa",
    ]
    assert book.default_names("novella-13m") == book.suites["heldout"]
    assert book.default_names("smollm2-135m") == ["wikitext2"]
    (quick,) = book.resolve(book.default_names("anything"))
    assert isinstance(quick, PerplexityTask) and quick.max_windows == 24, "short contexts have thousands of windows"
    assert quick.file == book.tasks["wikitext2"].file
    for task in book.tasks.values():
        assert isinstance(task, HarnessTask) or task.path.is_file()
    book.check_harness([*book.tasks, *book.suites, "mmlu", "mmlu_anatomy"])


def test_names_from_outside(book, tmp_path):
    own = tmp_path / "my notes-2.txt"
    own.write_text("hello")
    (task,) = book.resolve([str(own)])
    assert isinstance(task, PerplexityTask) and task.name == "my_notes_2" and task.read() == "hello"
    (task,) = book.resolve(["ceval-valid"])
    assert isinstance(task, HarnessTask) and (task.name, task.task) == ("ceval_valid", "ceval-valid")
    with pytest.raises(InputError, match="does not exist"):
        book.resolve([str(tmp_path / "none.jsonl")])
    (tmp_path / "wikitext2.txt").write_text("not that one")
    with pytest.raises(InputError, match="the name of another task"):
        book.resolve([str(tmp_path / "wikitext2.txt")])
    with pytest.raises(InputError, match=r"unknown evaluation task 'arc_eazy'; tasks: wikitext2.*mean .*arc_easy"):
        book.check_harness(["piqa", "arc_eazy"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [", "is not YAML"),
        ("suites: {}", "must map names to tasks"),
        ("tasks: {a: {kind: perplexity, file: x.txt, windw: 3}}", "tasks.a.perplexity.windw: Extra inputs"),
        ("tasks: {a-b: {kind: lm-eval}}", "a-b"),
        ("tasks: {a: {kind: other}}", "tasks.a"),
        ("tasks: {a: {kind: lm-eval}}\nsuites: {a: [a]}", "both a task and a suite"),
        ("tasks: {a: {kind: lm-eval}}\ndefault_suites: {'*': z}", "'z' is no suite"),
    ],
)
def test_bad_task_files(tmp_path, content, message):
    path = tmp_path / "evaluation.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_tasks(path)


def test_reading_texts(tmp_path):
    import pandas as pd

    rows = ["one\n", "", "two\u2028three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": r}, ensure_ascii=False) + "\n" for r in rows))
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert PerplexityTask(name="a", file=str(tmp_path / name)).read() == "\n\n".join(rows)
    for name, content, message in [
        ("empty.jsonl", "", "empty"),
        ("empty.txt", " \n", "empty"),
        ("bad.jsonl", '{"text": "x"}\n{"txt": 1}\n', "bad.jsonl:2"),
        ("bad.csv", "text", "must be one of"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            PerplexityTask(name="a", file=str(tmp_path / name)).read()


def test_fingerprints_follow_what_matters(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    task = PerplexityTask(name="a", file=str(tmp_path / "a.txt"))
    assert task.options() == {"kind": "perplexity", "window": 2048, "max_windows": None}
    before = data_digest(task)
    (tmp_path / "a.txt").write_text("two")
    assert data_digest(task) != before
    with pytest.raises(ValidationError):
        PerplexityTask(name="a b", file="x")


# lm-eval --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight rows each: piqa's shape, an mmlu subject in a nested folder, and a task of one's own."""
    root = tmp_path_factory.mktemp("eval")
    names = ["cat", "dog", "boy", "girl", "bird", "tree", "ball", "car"]
    piqa = [
        {"goal": f"What did the {n} do?", "sol1": "The end.", "sol2": "Go home.", "label": i % 2}
        for i, n in enumerate(names)
    ]
    mmlu = [
        {"question": f"Who is the {n}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i, n in enumerate(names)
    ]
    for folder, split, rows in [
        ("piqa", "validation", piqa),
        ("mmlu/anatomy", "test", mmlu),
        ("mmlu/anatomy", "dev", mmlu),
        ("pets", "test", piqa),
    ]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"task": "pets", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
    own |= {"doc_to_text": "{{goal}}", "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}"}
    (root / "pets" / "pets.yaml").write_text(yaml.safe_dump(own))
    return root


def test_harness_end_to_end(stories, folders, capfd, monkeypatch):
    from compression_dags.evaluation.harness import run_harness

    monkeypatch.chdir(folders)  # no clone: git has nothing to complain about
    padding = stories[1].pad_token
    tasks = [
        HarnessTask(name="piqa"),
        HarnessTask(name="anatomy", task="mmlu_anatomy", num_fewshot=2),
        HarnessTask(name="pets"),
        HarnessTask(name="piqa_3", task="piqa", limit=3),
    ]
    first = run_harness(*stories, tasks, [folders], batch_size=4, seed=1)
    assert list(first) == ["piqa", "anatomy", "pets", "piqa_3"]
    assert {"acc", "acc_stderr", "acc_norm", "version", "documents"} <= set(first["piqa"])
    assert [first[name]["documents"] for name in first] == [8, 8, 8, 3]
    assert first["anatomy"]["num_fewshot"] == 2
    assert all(0 <= scores["acc"] <= 1 for scores in first.values())
    assert run_harness(*stories, tasks, [folders], batch_size=1, seed=1) == first
    assert stories[1].pad_token == padding
    assert "".join(capfd.readouterr()) == ""


def test_harness_scores_are_the_models(stories, folders):
    """acc of the first two rows, computed by hand from log-likelihoods."""
    import torch

    from compression_dags.evaluation.harness import run_harness

    model, tokenizer = stories
    rows = [json.loads(line) for line in (folders / "pets" / "test.jsonl").read_text().splitlines()]

    def score(context: str, answer: str) -> float:
        ids, start = tokenizer(f"{context} {answer}")["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        return sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))

    right = [(score(r["goal"], r["sol2"]) > score(r["goal"], r["sol1"])) == r["label"] for r in rows]
    scores = run_harness(model, tokenizer, [HarnessTask(name="pets")], [folders])
    assert scores["pets"]["acc"] == pytest.approx(np.mean(right))


def test_harness_refuses(stories, folders, tmp_path, monkeypatch):
    from compression_dags.evaluation.harness import run_harness

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for task, message in [
        (HarnessTask(name="no_such"), "knows no task 'no_such'"),
        (HarnessTask(name="piqa", num_fewshot=1), r"'piqa' needs train\.jsonl in .*found validation"),
        (HarnessTask(name="mmlu_anatomy", task="super_glue"), "knows no task"),
    ]:
        with pytest.raises(InputError, match=message):
            run_harness(*stories, [task], [folders])
    both = [HarnessTask(name="mmlu_stem"), HarnessTask(name="mmlu_anatomy")]
    with pytest.raises(InputError, match="mmlu_anatomy is part of both mmlu_stem and mmlu_anatomy"):
        run_harness(*stories, both, [folders])

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"'piqa': its data .*HF_HUB_OFFLINE is set.*piqa/<split>\.jsonl"):
        run_harness(*stories, [HarnessTask(name="piqa")], [tmp_path])


def test_harness_digest(folders, tmp_path):
    task = HarnessTask(name="piqa")
    local, hub = data_digest(task, [folders]), data_digest(task)
    assert local != hub
    (tmp_path / "piqa").mkdir()
    rows = (folders / "piqa" / "validation.jsonl").read_text()
    (tmp_path / "piqa" / "validation.jsonl").write_text(rows)
    assert data_digest(task, [tmp_path]) == local  # content, not place
    (tmp_path / "piqa" / "validation.jsonl").write_text(rows.replace("cat", "cow"))
    assert data_digest(task, [tmp_path]) != local
    with pytest.raises(InputError, match="no_such"):
        data_digest(HarnessTask(name="no_such"), [Path(folders)])


def test_groups_expand_to_their_tasks(folders):
    from compression_dags.evaluation.harness import leaves

    found = leaves("mmlu_stem", [folders])
    assert len(found) == 19 and {"mmlu_anatomy", "mmlu_astronomy"} <= {leaf.name for leaf in found}
    assert {leaf.name for leaf in found if leaf.folder} == {"mmlu_anatomy"}
