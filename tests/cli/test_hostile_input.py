"""What people and broken disks hand in: one line with the file's name, exit 2, before anything is computed."""

from __future__ import annotations

import errno
import json
import lzma
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from compression_dags import failures
from compression_dags.calibration import texts
from compression_dags.calibration.corpora import corpora_digests, read_documents
from compression_dags.checkpoints import exporting
from compression_dags.cli.main import main
from compression_dags.cli.plan import _check_target, method_of
from compression_dags.errors import InputError, IntegrityError
from compression_dags.evaluation.added import FILE, added_tasks, asked_tasks, remember
from compression_dags.evaluation.tasks import MAX_NAME, PerplexityTask, evaluation_book, load_tasks
from compression_dags.paths import PROJECT
from compression_dags.provenance.artifacts import MANIFEST, Artifact, describe_files
from compression_dags.recipes import load_recipe, load_recipes
from compression_dags.recipes.kinds import TABLE
from compression_dags.recipes.names import fault, made_name
from compression_dags.recovery.stage import MOST_RECOVERIES
from compression_dags.yaml_reader import read_mapping

GOOD = "name: try-20\nstages:\n  - merge: {method: shortgpt, ratio: 0.20}\n"


def parquet(path: Path, **columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


# -- texts -----------------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ('{"text": "a"}\n{"text": "b', 2, "not a JSON object"),
    ('{"text": "a"}\nnull\n', 2, "but null"),
    ('{"text": "a"}\n["b"]\n', 2, "but a list"),
    ('{"text": "a"}\n\n7\n', 3, "but a number"),
    ('{"text": null}\n', 1, "a string, not null"),
    ('{"text": 45}\n', 1, "a string, not a number"),
    ('{"text": ["a"]}\n', 1, "a string, not a list"),
    ('{"text": {"a": 1}}\n', 1, "a string, not an object"),
    ('{"text": true}\n', 1, "a string, not true or false"),
    ('{"words": "a", "n": 1}\n', 1, "needs a `text` column; it has words, n"),
    ('{"text": "a", "text": "b"}\n', 1, "`text` twice"),
    ('{"text": "\\ud800"}\n', 1, "surrogate"),
    ("[" * 100_000, 1, "nested too deeply"),
    ('{"text": "a\0"}\n', 1, "not a JSON object"),
    (b'{"text": "caf\xe9"}\n', 1, "byte 0xe9 is not UTF-8"),
    ('{"text": "a"}\n'.encode("utf-16"), 1, "UTF-16"),
]


@pytest.mark.parametrize(("content", "row", "says"), BAD_ROWS)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz"])
def test_bad_rows_are_named(tmp_path, content, row, says, ending):
    path = tmp_path / f"rows{ending}"
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(lzma.compress(data) if ending.endswith("xz") else data)
    for read in (read_documents, lambda p: PerplexityTask(name="a", file=p).read()):
        with pytest.raises(InputError, match=says) as caught:
            read(str(path))
        assert f"{path}:{row}: " in str(caught.value) and "\n" not in str(caught.value)


def test_strings_stay_as_they_are(tmp_path):
    rows = ["0045", "2020-01-01", "one\u2028two", "None", "", "1e3"]
    lines = "\r\n".join(json.dumps({"text": r, "n": 10**30}, ensure_ascii=False) for r in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    parquet(tmp_path / "a.parquet", text=rows)
    for name in ("a.jsonl", "a.jsonl.xz", "a.parquet"):
        assert read_documents(str(tmp_path / name)) == [r for r in rows if r]
        assert PerplexityTask(name="a", file=str(tmp_path / name)).read() == "\n\n".join(rows)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree")
    assert read_documents(str(tmp_path / "a.txt")) == ["one", "two\nthree"]


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    for columns, says in [
        ({"text": ["a", None]}, r"row 2: `text` must be a string, not null"),
        ({"text": [1, 2]}, "must hold strings, not int64"),
        ({"text": [["a"]]}, "must hold strings, not list"),
        ({"text": [b"\xff"]}, "must hold strings, not binary"),
        ({"words": ["a"]}, "needs a `text` column; it has words"),
    ]:
        parquet(path, **columns)
        with pytest.raises(InputError, match=says):
            texts.check(path)
    parquet(path, text=["some words"] * 1000)
    for damaged in (b"", b"PAR1", b"no parquet at all", path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: is (an empty file|no readable parquet)"):
            texts.check(path)


def test_what_is_no_text_file(tmp_path):
    whole = lzma.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[:-20])
    (tmp_path / "no.jsonl.xz").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "nul.txt").write_bytes(b"a\nb\0c")
    (tmp_path / "latin.txt").write_bytes(b"a\ncaf\xe9")
    (tmp_path / "a.csv").write_text("text\na\n")
    for name, says in [
        ("cut.jsonl.xz", "no whole .xz file"),
        ("no.jsonl.xz", "no whole .xz file"),
        ("folder.txt", "is a directory"),
        ("link.txt", "is a link to nothing"),
        ("pipe.jsonl", "is a pipe"),
        ("nul.txt", "nul.txt:2: holds a NUL"),
        ("latin.txt", "latin.txt:2: byte 0xe9"),
        ("a.csv", "must be one of"),
    ]:
        with pytest.raises(InputError, match=says):
            texts.check(tmp_path / name)
        with pytest.raises(InputError, match=says):
            read_documents(str(tmp_path / name))


def test_a_file_is_checked_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert texts.check(path) and corpora_digests([str(path)])[str(path)] == texts.digest(path)
    first = texts.digest(path)
    monkeypatch.setattr(texts, "rows", lambda _: pytest.fail("read again"))
    assert texts.check(path)
    monkeypatch.undo()
    path.write_text("   ")
    assert not texts.check(path) and texts.digest(path) != first


# -- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b", ":2: name: is given twice; first in line 1"),
        ("a: {b: 1, b: 2}", ":1: a.b: is given twice"),
        ("a: &x 1\nb: *x", ":1: a: anchors and aliases"),
        ("a: !!python/object:os.system x", ":1: a: tags are not allowed"),
        ("a: " + "[" * 3000, "nested deeper than"),
        ("- " * 5000, "nested deeper than"),
        ("a: 0x10", "a: '0x10' is not a plain finite number"),
        ("a: 010", "a: '010' is not a plain"),
        ("a: 1_000", "a: '1_000' is not a plain"),
        ("a: 1:30", "a: '1:30' is not a plain"),
        ("a: .nan", "a: '.nan' is not a plain finite"),
        ("a: 1e999", "a: '1e999' is not a plain finite"),
        ("a: " + "9" * 5000, "is not a plain finite"),
        ("a: 1\nnull: x", ":2: the key 'null' must be text"),
        ("? [a]\n: b", "a key must be text"),
        ("a: 1\n---\nb: 2", ":2: a second document"),
        ("a:\n\t- b", ":2: is not YAML"),
        ("a: b: c", ":1: is not YAML"),
        ("a: 'b", "is not YAML"),
        ("", "is empty"),
        ("- a", "must be a mapping"),
        ("a: 1\nb: \0", ":2: character U+0000"),
        (b"a: 1\nb: caf\xe9", ":2: byte 0xe9 is not UTF-8"),
        ("a: 1\n" * 300_000, "larger than"),
    ],
)
def test_yaml_refused(text, says):
    with pytest.raises(InputError) as caught:
        read_mapping(text, "f.yaml")
    assert str(caught.value).startswith("f.yaml:") and says in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_taken():
    text = "a: no\nb: 2026-13-45\nc: 1e-3\nd: '010'\ne: true\nf: ~\ng: [1, -2.5, +3]\nh: |\n  x: 1\n"
    found = read_mapping("\ufeff".encode() + text.encode(), "f.yaml")
    assert found.values == {
        "a": "no",
        "b": "2026-13-45",
        "c": 1e-3,
        "d": "010",
        "e": True,
        "f": None,
        "g": [1, -2.5, 3],
        "h": "x: 1\n",
    }
    assert found.line(("g", 1)) == 7 and found.line(("h", "x")) == 8
    assert read_mapping("a: 1_000\nb: .nan", "f", odd_numbers="text").values == {"a": "1_000", "b": ".nan"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0.20", ".nan", "3: stages.0.merge.ratio"),
        ("0.20", "'nan'", "3: stages.0.merge.ratio: 'nan'"),
        ("0.20", "'inf'", "3: stages.0.merge.ratio: 'inf'"),
        ("ratio: 0.20", "layers: true", "3: stages.0.merge: layers: must be a number, not true"),
        ("shortgpt", "no", "3: stages.0.merge.method: 'no' is unknown"),
        ("shortgpt", "[a]", "is unknown"),
        ("try-20", "all", "1: name: 'all' is reserved"),
        ("try-20", "leaderboard", "is reserved"),
        ("try-20", "a" * 64, "has 64 characters"),
        ("try-20", "12", "1: name: 12 must be lower-case"),
        ("stages:", "description: {a: b}\nstages:", "2: description: {'a': 'b'} must be text"),
        ("stages:", "calibration: {seed: 2026-13-45}\nstages:", "2: calibration.seed: '2026-13-45'"),
    ],
)
def test_recipes_refused(tmp_path, old, new, says):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert f"{path}:" in str(caught.value) and says in str(caught.value)


def test_options_on_the_command_line():
    assert method_of("gptq") == {"method": "gptq"}
    assert method_of("{method: gptq, act_order: no}") == {"method": "gptq", "act_order": "no"}
    for text in ("{method: gptq, damping: .nan}", "{method: a, method: b}", "[" * 3000, "{a: 1}", "a: &x b", "\0", ""):
        with pytest.raises(InputError, match="is no method"):
            method_of(text)


def test_names_that_plan_makes(tmp_path):
    long = "planned-" + "a" * 300 + "-4.5-bits"
    assert fault(made_name(long)) is None and made_name(long) != made_name(long.replace("4.5", "4"))
    assert made_name("planned-Org--Model_1.5B-120mb") == "planned-org-model-1-5b-120mb"
    with pytest.raises(InputError, match="is reserved"):
        _check_target("all", tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"\xe9 by hand")
    with pytest.raises(InputError, match="was not made by plan"):
        _check_target("mine", tmp_path)
    assert os.listdir(tmp_path) == ["mine.yaml"]


# -- a folder with bad files -----------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A recipes folder in which only `try-20` is good."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "try-20.yaml").write_text(GOOD)
    (folder / "latin.yaml").write_bytes(b"name: latin\ndescription: caf\xe9\n")
    (folder / "deep.yaml").write_text("name: deep\nstages: " + "[" * 3000)
    (folder / "date.yaml").write_text(GOOD.replace("try-20", "date").replace("0.20", "2026-13-45"))
    (folder / "twice.yaml").write_text(GOOD)
    (folder / "folder.yaml").mkdir()
    (folder / "link.yaml").symlink_to("gone.yaml")
    (folder / "reserved.yaml").write_text(GOOD.replace("try-20", "all"))
    os.mkfifo(folder / "pipe.yaml")
    (folder / "._try-20.yaml").write_bytes(b"\0\5\x16\7")
    text = GOOD.replace("try-20", "text") + "evaluate: [gone.txt]\n"
    (folder / "text.yaml").write_text(text)
    monkeypatch.setenv("COMPRESSION_DAGS_RECIPES", str(folder))
    monkeypatch.setenv("COMPRESSION_DAGS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(failures.DEBUG, raising=False)
    return tmp_path


def cli(*arguments: str, code: int | None = 2):
    done = CliRunner().invoke(main, list(arguments))
    if code is not None:
        assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done


def refused(*arguments: str) -> str:
    """The one line of a refusal."""
    done = cli(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.output
    return lines[0]


BAD_FILES = {f"{n}.yaml" for n in ("latin", "deep", "date", "twice", "folder", "link", "reserved", "pipe")}


def test_a_bad_file_costs_itself(desk):
    found = load_recipes(desk / "recipes")
    assert set(found) == {"try-20", "text"} and {p.name for p in found.left_out} == BAD_FILES
    listed = cli("recipes", "--json")
    said = json.loads(listed.stdout)
    assert set(said) == {"try-20", "left_out"} and {Path(p).name for p in said["left_out"]} == BAD_FILES | {"text.yaml"}
    assert all("\n" not in why and name in why for name, why in said["left_out"].items())
    assert "left out: 9" in cli("recipes").stdout
    for name, says in [("latin", "latin.yaml:2: byte 0xe9"), ("pipe", "is a pipe"), ("all", "is reserved")]:
        assert says in refused("run", "-m", "stories260k", "-r", name)
    assert not (desk / "home").exists()


def test_the_ui_loads_what_is_good(desk):
    from compression_dags.assets.selection import Planner
    from compression_dags.definitions import Settings, defs

    longest = made_name("long-" * 50)
    (desk / "recipes" / "long.yaml").write_text(GOOD.replace("try-20", longest))
    home = desk / "home"
    home.mkdir()
    for content in ('["heldout_stories", " heldout_c4", "gone.txt", 3]', "{", '{"a": [1], "b": "gone.txt"}', "\0", "3"):
        (home / FILE).write_text(content)
        assert {"compress", "evaluate", "summarise"} <= set(defs().get_repository_def().job_names)
    assert set(Planner([], Settings(home).resources()).recipes()) == {"baseline", "try-20", longest}


def test_one_recovery_too_many_is_refused_with_its_place(desk):
    """Each is an asset of its own, and there are so many."""
    path, recover = desk / "recipes" / "many.yaml", "  - recover: {method: least-squares}\n"
    path.write_text(GOOD.replace("try-20", "many") + MOST_RECOVERIES * recover)
    assert len(load_recipe(path).recoveries) == MOST_RECOVERIES == sum(n.startswith("recovered_") for n in TABLE)
    path.write_text(path.read_text() + recover)
    said = refused("run", "-m", "stories260k", "-r", "many")
    assert "many.yaml:7: stages.4: one recovery too many; a recipe may have at most 3" in said
    assert not (desk / "home").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tasks: {a: {kind: perplexity, file: a.txt}}\ntasks: {}", "evaluation.yaml:2: tasks: is given twice"),
        ("tasks: {a: {kind: perplexity, file: a.txt, window: .inf}}", "evaluation.yaml:1: tasks.a.window"),
        ("tasks: [a]", "must map names to tasks"),
        ("", "is empty"),
    ],
)
def test_a_bad_evaluation_file_is_named(desk, content, says):
    (desk / "recipes" / "evaluation.yaml").write_text(content)
    assert says in refused("run", "-m", "stories260k", "-r", "try-20")
    assert says in json.loads(cli("recipes", "--json").stdout)["left_out"]["evaluation.yaml"]


def test_places_of_a_task_are_lines(tmp_path):
    (tmp_path / "e.yaml").write_text("tasks:\n  a:\n    kind: perplexity\n    file: x.txt\n    windw: 3\n")
    with pytest.raises(InputError, match=r"e\.yaml:5: tasks\.a\.perplexity\.windw"):
        load_tasks(tmp_path / "e.yaml")


def test_a_bad_corpus_is_named_before_the_model_is_registered(desk):
    path = desk / "rows.jsonl"
    path.write_text('{"text": "a"}\nnull\n')
    own = GOOD + f"calibration: {{corpus: {path}}}\n"
    (desk / "recipes" / "try-20.yaml").write_text(own)
    assert f"recipe try-20: {path}:2: " in refused("run", "-m", "stories260k", "-r", "try-20")
    distilled = f"  - recover: {{method: distill-sp, corpora: ['{path}']}}\n"
    (desk / "recipes" / "try-20.yaml").write_text(GOOD + distilled)
    assert f"{path}:2: " in refused("run", "-m", "stories260k", "-r", "try-20")
    assert f"{path}:2: " in refused("run", "-m", "stories260k", "-r", "try-20", "--tasks", str(path))
    assert not (desk / "home").exists()


# -- tasks of the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["no_such_task", " , ", "", "gone.txt", "heldout_c4,gone.txt", "a.txt,no_such"])
def test_a_refused_task_leaves_no_trace(desk, value, monkeypatch):
    monkeypatch.chdir(desk)
    Path("a.txt").write_text("Once upon a time")
    assert refused("run", "-m", "stories260k", "-r", "try-20", "--tasks", value)
    assert not (desk / "home").exists()


def test_names_of_asked_tasks(tmp_path):
    home, book = tmp_path / "home", evaluation_book(PROJECT / "recipes")
    files = [tmp_path / folder / name for folder in "ab" for name in ("valid.txt", "x" * 200 + ".txt", "ж.txt")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text of {file.parent.name}")
    (tmp_path / "boolq.txt").write_text("not that one")
    assert [t.name for t in asked_tasks(" heldout_stories, ,heldout_c4 ", book, [])] == [
        "heldout_stories",
        "heldout_c4",
    ]
    first = asked_tasks(str(files[0]), book, [])
    remember(home, first, book)
    second = asked_tasks(str(files[3]), book, added_tasks(home, book))
    assert first[0].name == "valid" and second[0].name.startswith("valid_") and second[0].name != "valid"
    remember(home, second, book)
    again = asked_tasks(f"{files[3]},{files[0]}", book, added_tasks(home, book))
    assert {t.name for t in again} == {first[0].name, second[0].name}
    every = asked_tasks(",".join(map(str, files)), book, added_tasks(home, book))
    assert len({t.name for t in every}) == 6 and all(len(t.name) <= MAX_NAME for t in every)
    (other,) = asked_tasks(str(tmp_path / "boolq.txt"), book, [])
    assert other.name.startswith("boolq_")  # a suite means lm-eval's by that name
    files[0].unlink()
    assert [t.name for t in added_tasks(home, book)] == [second[0].name]


def test_a_later_task_of_the_file_takes_its_name_back(tmp_path):
    text = tmp_path / "valid.txt"
    text.write_text("words")
    book = evaluation_book(PROJECT / "recipes")
    remember(tmp_path / "home", asked_tasks(str(text), book, []), book)
    own = {"valid": PerplexityTask(name="valid", file="data/heldout/c4.jsonl"), **book.tasks}
    (task,) = added_tasks(tmp_path / "home", book.model_copy(update={"tasks": own}))
    assert task.name.startswith("valid_") and task.file == str(text)


# -- the net ---------------------------------------------------------------------------------------------------------

FAILURES = [
    (OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: the disk of /x/y is full; nothing stored"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "is full; nothing stored is lost"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 2, "is full"),
    (shutil.Error([("a", "b", "[Errno 5] Input/output error")]), 2, "Input/output error"),
    (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid start byte"), 2, "cannot be read: UnicodeDecodeError"),
    (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
    (lzma.LZMAError("Corrupt"), 2, "LZMAError: Corrupt"),
    (MemoryError(), 1, "failed: out of memory"),
    (IntegrityError("not\nfinite"), 1, "failed: not finite"),
    (ValueError("odd"), 1, "failed: ValueError: odd"),
    (KeyboardInterrupt(), 130, failures.STOPPED),
]


@pytest.mark.parametrize(("error", "code", "says"), FAILURES, ids=lambda v: type(v).__name__)
def test_every_failure_is_one_line(desk, monkeypatch, error, code, says):
    def fail(*_):
        raise error

    monkeypatch.setattr("compression_dags.recipes.load_recipes", fail)
    done = cli("recipes", "--json", code=code)
    assert says in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    shown = cli("--debug", "recipes", code=code).stderr
    assert "Traceback" in shown and says in shown.splitlines()[-1]
    monkeypatch.setenv(failures.DEBUG, "0")


def test_a_reader_that_leaves_is_no_failure(desk, monkeypatch):
    monkeypatch.setattr("compression_dags.cli.main.emit", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert cli("methods", code=141).stderr == ""


def test_dagster_s_interruption_is_a_stop(desk, monkeypatch):
    from dagster._core.errors import DagsterExecutionInterruptedError

    def fail(*_):
        raise DagsterExecutionInterruptedError()

    monkeypatch.setattr("compression_dags.recipes.load_recipes", fail)
    assert cli("recipes", code=130).stderr == failures.STOPPED + "\n"


def test_failures_inside_assets_keep_their_kind():
    def told(*chain: tuple[str, str]) -> tuple[int, str]:
        failure = failures.explain(failures.explain_step("a__b", chain, "1234"))
        return failure.exit_code, failure.spoken()

    outer = ("DagsterExecutionStepExecutionError", "Error occurred")
    refusal = ("InputError", "compression_dags.errors.InputError: no such\n\nStack Trace:\n x")
    assert told(outer, refusal, ("KeyError", "1")) == (2, "error: no such")
    assert told(outer, ("IntegrityError", "IntegrityError: not finite")) == (1, "failed: a__b: not finite (run 1234)")
    code, line = told(outer, ("SafetensorError", "I/O error: No space left on device (os error 28)"))
    assert code == 2 and "is full; nothing stored is lost" in line
    assert told(outer, ("OutOfMemoryError", "CUDA out of memory"))[0] == 1
    assert told(outer, ("KeyError", "'x'")) == (1, "failed: a__b: KeyError: 'x' (run 1234)")
    assert told(outer, ("DagsterExecutionInterruptedError", "")) == (130, failures.STOPPED)


@pytest.mark.parametrize("verb", [("models",), ("leaderboard",), ("store",), ("decisions", "-m", "stories260k")])
def test_homes_that_are_none(desk, verb):
    home = desk / "a file"
    home.write_text("")
    assert "is a file" in refused(*verb, "--home", str(home))
    missing = desk / "missing"
    cli(*verb, "--home", str(missing), code=None if verb[0] == "decisions" else 0)
    assert not missing.exists()


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path) -> Artifact:
    folder = tmp_path / "home" / "artifacts" / "w"
    (folder / "checkpoint" / "sub").mkdir(parents=True)
    for name in ("config.json", ".hidden", "sub/part.bin"):
        (folder / "checkpoint" / name).write_text(name)
        (folder / "checkpoint" / name).chmod(0o444)
    (folder / MANIFEST).write_text(json.dumps({"files": describe_files(folder)}))
    return Artifact("w", "f", "d", folder)


def exported(weights: Artifact, target: Path) -> None:
    with exporting.new_directory(target, outside=weights.path.parents[1]) as work:
        exporting.copy_checkpoint(weights, work)


def test_an_export_is_whole_or_not_there(tmp_path, weights, monkeypatch):
    target = tmp_path / "new" / "out"

    def full(source, copy):
        copy.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(copy))

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_copy", full)
        with pytest.raises(InputError, match="No space left on device; nothing was left there"):
            exported(weights, target)
    assert not target.parent.exists()
    exported(weights, target)
    assert sorted(p.name for p in target.rglob("*")) == [".hidden", "config.json", "part.bin", "sub"]
    assert {oct(p.stat().st_mode & 0o777) for p in [target, *target.rglob("*")]} == {"0o644", "0o755"}
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="new or empty"):
        exported(weights, target)


def test_an_empty_folder_is_filled_also_where_it_cannot_be_replaced(tmp_path, weights, monkeypatch):
    (tmp_path / "empty").mkdir()
    exported(weights, tmp_path / "empty")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    exported(weights, tmp_path / "mount")
    assert sorted(os.listdir(tmp_path / "empty")) == sorted(os.listdir(tmp_path / "mount"))


def test_exports_refused(tmp_path, weights):
    (tmp_path / "file").write_text("")
    for target, says in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is no directory"),
        (tmp_path / "home" / "out", "lies in the home"),
        (weights.checkpoint, "lies in the home"),
        (tmp_path / ("n" * 300), "File name too long"),
    ]:
        with pytest.raises(InputError, match=says):
            exported(weights, target)
    stored = weights.checkpoint / "config.json"
    stored.chmod(0o644)
    stored.write_text("confih.json")
    with pytest.raises(IntegrityError, match=r"config\.json is damaged"):
        exported(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists() and sorted(os.listdir(tmp_path)) == ["file", "home"]
