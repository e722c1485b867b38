"""A step whose source changed needs a decision: raise its version, or say that no stored result changes."""

import ast
import os

import code_versions
from code_versions import RECORD, changed_without_version, closure, record, steps


def test_source_changed_means_version_changed():
    """Re-record with `COMPRESSION_DAGS_RECORD_VERSIONS=1 ./run test tests/provenance/test_code_versions.py`."""
    if os.environ.get("COMPRESSION_DAGS_RECORD_VERSIONS"):
        record()
    assert RECORD.is_file()
    assert changed_without_version() == []


def test_every_request_of_the_graph_is_guarded():
    """Each place in assets/ and resources/ that makes a Request is a step, and so is each method of the registry."""
    from compression_dags.registry import METHODS

    found = steps()
    assert all(f"{stage}: {name}" in found for stage, group in METHODS.items() for name in group)
    for path in code_versions.declaring():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        requests = sum(isinstance(c.func, ast.Name) and c.func.id == "Request" for c in calls)
        inside = list(code_versions._builders(path))
        assert requests == sum(len(list(code_versions._requests(f))) for f in inside), path
        assert all(f"{path.stem}.{f.name}" in found for f in inside)


def test_the_closure_follows_named_workers_and_imports_inside_functions_but_not_the_type_checker_s():
    gptq = closure("compression_dags.quantization.gptq")
    assert {"compression_dags.kernels.round", "compression_dags.calibration.streaming"} <= gptq
    assert "compression_dags.quantization.awq" not in closure("compression_dags.depth.methods.shortgpt")
    assert "compression_dags.depth.mka.search" in closure("compression_dags.depth.mka.options")


def test_docstrings_and_comments_do_not_count_and_code_does():
    def digest(text):
        return code_versions._digest(ast.parse(text))

    plain = digest("def f(x):\n    return x + 1\n")
    assert digest('"""About."""\ndef f(x):\n    """Says."""\n    # why\n    return (x + 1)\n') == plain
    assert digest("def f(x):\n    return x + 2\n") != plain
