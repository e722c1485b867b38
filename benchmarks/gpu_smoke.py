"""Every registered method through the command line of the installed wheel, on two devices, compared row by row.

Run it from an empty directory, with the wheel (not the checkout) on Python's path; benchmarks/gpu_machine.sh does both.
Models: stories260k and a tiny random one of every architecture. Each model goes through all its recipes in one `run` on
each device in float32, in a home of its own, and once more on the second device in that device's own dtype. A recipe
that a model's headers refuse is run alone on both devices, and must be refused by both in the same words.

A row passes when both devices chose the same layers, wrote as many layers, parameters and bytes, and their perplexities
agree within `Tolerance.float32`. Weights are compared after dequantization, relative to their Frobenius norm, and agree
within `Tolerance.weights`. Methods that pick single weights or channels, search, train, or carry rounding errors on
amplify the last bit of a sum (`AMPLIFIES`): their perplexities may be further apart, and the difference of their
weights is only put down. The run in the default dtype must end, and score near the first device's float32. Rows and
tolerances are those of gpu_smoke_rows.py.

There is no --tiny: it needs the installed wheel and a GPU. The suite checks that every method has a case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from gpu_smoke_cases import CASES, given_layers, missing
from gpu_smoke_rows import AMPLIFIED, PLAIN, TRAINED, Row, Run, compare, refusal_row, table

REPOSITORY = Path(__file__).resolve().parent.parent
STORIES = "stories260k"
LAYERS = 6
#: Neighbours of one kind: only such may be merged.
KINDS = {"layer_types": ["sliding_attention"] * (LAYERS // 2) + ["full_attention"] * (LAYERS // 2)}
MIXED: dict[str, Any] = {"qwen3": KINDS, "gemma3_text": KINDS}


def installed() -> Path:
    """The package's folder in the installed wheel.

    Raises:
        SystemExit: it lies in a checkout.
    """
    import compression_dags

    package = Path(compression_dags.__file__).resolve().parent
    if not (package / "shipped").is_dir() or (package.parent / "pyproject.toml").exists():
        raise SystemExit(f"{package} is no installed wheel: install it, and run this from an empty directory")
    return package


# -- what is run -------------------------------------------------------------------------------------------------------


def write_models(folder: Path, package: Path, wanted: Iterable[str]) -> dict[str, Path]:
    """Name → directory of each wanted model."""
    sys.path += [str(REPOSITORY / "tests" / "support"), str(REPOSITORY)]
    import any_models

    from models import FAMILIES, tiny

    asked = list(wanted) or [STORIES, *FAMILIES]
    if unknown := set(asked) - {STORIES, *FAMILIES, *any_models.FAMILIES}:
        raise SystemExit(f"unknown models: {', '.join(sorted(unknown))}; known: {STORIES} and families of transformers")

    def made(name: str) -> Path:
        if name == STORIES:
            return package / "shipped" / "models" / STORIES
        if name in FAMILIES:
            return tiny(name, folder / name, layers=LAYERS, **MIXED.get(name, {}))
        return any_models.tiny_any(name, folder / name, layers=LAYERS)

    return {name: made(name) for name in asked}


def write_recipes(folder: Path, layers: int, wanted: str) -> list[str]:
    """Recipe files of all cases; returns their names."""
    folder.mkdir(parents=True)
    names = [name for name in CASES if wanted in name]
    for name in names:
        stages = [{kind: given_layers(options, layers)} for kind, options in CASES[name]]
        calibration = {"corpus": "c4-sample", "sequences": 8, "length": 128}
        recipe = {"name": name, "description": "smoke", "calibration": calibration, "stages": stages}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return names


def feasible(recipes: Path, model: Path) -> dict[str, str]:
    """Recipe → why its model's headers refuse it, empty where they do not."""
    from compression_dags.checkpoints.reader import Checkpoint
    from compression_dags.errors import InputError
    from compression_dags.recipes import load_recipes

    shape, found = Checkpoint(model).stated_shape, {}
    for name, recipe in load_recipes(recipes).items():
        try:
            recipe.check(shape)
            found[name] = ""
        except InputError as error:
            found[name] = str(error)
    return found


class Commands:
    """Calls of the command line, each a process in the empty directory."""

    def __init__(self, work: Path, threads: int, seconds: float):
        self.work, self.text, self.end = work, work / "text.txt", time.monotonic() + seconds
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}

    def run(self, run: Run, recipes: list[str]) -> subprocess.CompletedProcess[str]:
        names = [word for name in recipes for word in ("-r", name)]
        command = [sys.executable, "-m", "compression_dags.cli", "run", "-m", str(run.path), *names]
        command += ["--tasks", str(self.text), "--home", str(run.home), "--device", run.device, "--dtype", run.dtype]
        return self.called([*command, "--json"], COMPRESSION_DAGS_RECIPES=str(self.work / "recipes" / run.model))

    def called(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """A finished process; what still runs when the time allowed is over is stopped, with exit code 124."""
        try:
            return subprocess.run(
                command,
                cwd=self.work / "empty",
                env=self.environment | environment,
                timeout=max(0.1, self.end - time.monotonic()),
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", "failed: not finished in time")

    def whole(self, run: Run, recipes: list[str]) -> Run:
        """All recipes in one call; one that fails is put down by name, and the call is made again without it."""
        start, left = time.monotonic(), list(recipes)
        while left:
            done = self.run(run, left)
            if done.returncode == 0:
                run.found = json.loads(done.stdout)
                break
            line = _last_line(done.stderr)
            bad = [n for n in left if f"|{n}:" in line or f" {n}:" in f" {line}"]
            bad = bad or left
            run.failed |= dict.fromkeys(bad, line)
            left = [n for n in left if n not in bad]
        run.seconds = round(time.monotonic() - start, 1)
        failed = f", {len(run.failed)} failed" if run.failed else ""
        print(f"{run.seconds:6.1f} s  {run.model} on {run.device} {run.dtype}{failed}", file=sys.stderr, flush=True)
        return run

    def refusal(self, run: Run, recipe: str) -> tuple[int, str]:
        done = self.run(run, [recipe])
        return done.returncode, _last_line(done.stderr)

    def tests(self) -> list[dict[str, str]]:
        """Outcome of each test that is marked `gpu`, run against the wheel."""
        files = [p for p in (REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
        report = self.work / "tests.xml"
        options = ["-m", "gpu", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), *options]
        done = self.called([*command, *map(str, sorted(files))])
        print(done.stdout[-3000:], file=sys.stderr, flush=True)
        if not report.exists():
            return [{"test": "pytest", "outcome": "failed", "why": (done.stdout + done.stderr)[-500:]}]
        return [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def _outcome(case: ElementTree.Element) -> dict[str, str]:
    found = next((child for child in case if child.tag in {"failure", "error", "skipped"}), None)
    outcome = {None: "passed", "skipped": "skipped"}.get(found.tag if found is not None else None, "failed")
    why = " ".join((found.get("message") or "").split())[:200] if found is not None else ""
    return {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome, "why": why}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(("error:", "failed:"))] or text.splitlines()
    return lines[-1].strip() if lines else "no message"


# -- what is compared --------------------------------------------------------------------------------------------------


# -- what is printed ---------------------------------------------------------------------------------------------------


def main() -> int:
    args = arguments()
    package = installed()
    if absent := missing():
        raise SystemExit(f"no case for {', '.join(absent)}: add one to {Path(__file__).parent / 'gpu_smoke_cases.py'}")
    args.work.mkdir(parents=True)
    (args.work / "empty").mkdir()
    start = time.monotonic()
    models = write_models(args.work / "models", package, args.models)
    text = (package / "shipped" / "data" / "heldout" / "stories.jsonl").read_text().splitlines()
    (args.work / "text.txt").write_text("\n\n".join(json.loads(line)["text"] for line in text)[: args.characters])
    commands, first, second = Commands(args.work, args.threads, args.seconds), *args.devices
    runs: dict[str, list[Run]] = {}
    refused: dict[str, dict[str, str]] = {}
    recipes: dict[str, list[str]] = {}
    for model, path in models.items():
        folder = args.work / "recipes" / model
        depth = json.loads((path / "config.json").read_text()).get("num_hidden_layers", LAYERS)
        write_recipes(folder, depth, args.only)
        found = feasible(folder, path)
        recipes[model] = [n for n, why in found.items() if not why]
        refused[model] = {n: why for n, why in found.items() if why}
        kinds = [(first, "float32"), (second, "float32"), (second, "auto")]
        runs[model] = [
            Run(model, path, device, dtype, args.work / "homes" / f"{model}-{i}")
            for i, (device, dtype) in enumerate(kinds)
        ]
    with ThreadPoolExecutor(args.jobs) as pool:
        tests = None if args.no_tests else pool.submit(commands.tests)
        working = [pool.submit(commands.whole, r, recipes[m]) for m, group in runs.items() for r in group if recipes[m]]
        answers = {
            (m, n): [pool.submit(commands.refusal, _apart(r, n), n) for r in runs[m][:2]]
            for m, names in refused.items()
            for n in names
        }
        for future in working:
            future.result()
        rows = [refusal_row(m, n, [a.result() for a in asked]) for (m, n), asked in answers.items()]
        tested = tests.result() if tests else []
    rows = compare(runs, recipes, args.jobs) + rows
    return report(args, package, runs, rows, tested, time.monotonic() - start)


def _apart(run: Run, recipe: str) -> Run:
    """A home of its own: the model's other homes are in use."""
    return Run(run.model, run.path, run.device, run.dtype, run.home.with_name(f"{run.home.name}-{recipe}"))


def report(
    args: argparse.Namespace,
    package: Path,
    runs: dict[str, list[Run]],
    rows: list[Row],
    tests: list[dict[str, str]],
    seconds: float,
) -> int:
    bad = [r for r in rows if not r.passed]
    failed = [t for t in tests if t["outcome"] == "failed"]
    lines = [table(rows), ""]
    lines += [f"{line}  ({n} rows)" for line, n in _counted(r.refused for r in rows if r.refused)]
    lines += [f"FAILED {r.recipe} on {r.model}: {r.why}"[:400] for r in bad]
    lines += [f"FAILED {t['test']}: {t['why']}" for t in failed]
    lines += [f"not run: {t['test']}: {t['why']}" for t in tests if t["outcome"] == "skipped"]
    lines.append(
        f"{len(rows)} rows, {len(bad)} failed, {sum(bool(r.refused) for r in rows)} refused by both devices; "
        f"{len(tests)} tests marked gpu, {len(failed)} failed; {args.devices[0]} against {args.devices[1]}; "
        f"{seconds:.0f} s; wheel at {package}"
    )
    print("\n".join(lines))
    found = {
        "machine": machine(args.devices),
        "seconds": round(seconds, 1),
        "tolerances": {"plain": asdict(PLAIN), "amplified": asdict(AMPLIFIED), "trained": asdict(TRAINED)},
        "rows": [asdict(r) for r in rows],
        "runs": [{k: str(v) for k, v in asdict(r).items() if k != "found"} for g in runs.values() for r in g],
        "tests": tests,
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    if not args.keep:
        shutil.rmtree(args.work)
    return 1 if bad or failed else 0


def _counted(lines: Iterable[str]) -> list[tuple[str, int]]:
    listed = list(lines)
    return [(line, listed.count(line)) for line in dict.fromkeys(listed)]


def machine(devices: list[str]) -> dict[str, Any]:
    import torch
    import transformers

    names = [torch.cuda.get_device_name(d) if d.startswith("cuda") else "cpu" for d in devices]
    return {"devices": names, "torch": torch.__version__, "transformers": transformers.__version__}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that does not exist yet; removed at the end")
    parser.add_argument("--out", type=Path, default=None, help="everything, as JSON")
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda:0"], metavar="DEVICE")
    parser.add_argument("--models", nargs="*", default=[], metavar="MODEL", help="only these")
    parser.add_argument("--only", default="", metavar="WORD", help="only recipes with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seconds", type=float, default=480, help="then what still runs is stopped and has failed")
    parser.add_argument("--characters", type=int, default=8000, help="of the text that is scored")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests marked gpu out")
    parser.add_argument("--keep", action="store_true", help="keep --work")
    args = parser.parse_args()
    args.work = args.work.absolute()
    if args.work.exists():
        parser.error(f"--work {args.work} exists")
    return args


if __name__ == "__main__":
    sys.exit(main())
