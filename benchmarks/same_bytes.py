"""One recipe of every method, in two homes at two places under two hash seeds: are all artifacts equal to the byte?

Run it from the repository's root with the project installed: `./run python benchmarks/same_bytes.py`. It prints a row
a kind of artifact and every artifact whose digest, or a file of it, differs.

There is no --tiny: two runs of the command line take longer than seconds. tests/resources/test_truth.py compares the
bytes of one recipe of four stages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from gpu_smoke_cases import CASES, given_layers, missing

from compression_dags.paths import PROJECT

LAYERS = 5  # of stories260k


def write_recipes(folder: Path) -> list[str]:
    """The names of a recipe for every registered method, written into a folder."""
    if absent := missing():
        raise SystemExit(f"no case for {', '.join(absent)}: add one to benchmarks/gpu_smoke_cases.py")
    folder.mkdir(parents=True)
    for name, parts in CASES.items():
        stages = [{kind: given_layers(options, LAYERS)} for kind, options in parts]
        recipe = {"name": name, "calibration": {"sequences": 8, "length": 128}, "stages": stages}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return list(CASES)


def run(desk: Path, seed: str) -> dict[tuple[str, str], dict]:
    """Kind and fingerprint → manifest of everything that one run left in a home of its own."""
    names = write_recipes(desk / "recipes")
    model = shutil.copytree(PROJECT / "models" / "stories260k", desk / "stories")
    command = [sys.executable, "-m", "compression_dags.cli", "run", "-m", str(model), "--home", str(desk / "home")]
    for name in names:
        command += ["-r", name]
    environment = os.environ | {"PYTHONHASHSEED": seed, "COMPRESSION_DAGS_RECIPES": str(desk / "recipes")}
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=desk, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"the run in {desk} ended with {done.returncode}")
    found = [json.loads(path.read_text()) for path in (desk / "home" / "artifacts").rglob("manifest.json")]
    return {(m["request"]["kind"], m["fingerprint"]): m for m in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=None, help="where the homes go; default: a temporary folder")
    place = Path(parser.parse_args().work or tempfile.mkdtemp(prefix="same-bytes-"))
    start = time.monotonic()
    one, two = run(place / "one", "1"), run(place / "another place", "2")
    odd = [key for key in one.keys() | two.keys() if _said(one.get(key)) != _said(two.get(key))]
    print("| kind | artifacts | differing |\n| --- | --- | --- |")
    counts, bad = Counter(kind for kind, _ in one), Counter(kind for kind, _ in odd)
    for kind, count in sorted(counts.items()):
        print(f"| {kind} | {count} | {bad[kind]} |")
    for kind, fingerprint in odd:
        print(f"DIFFERS {kind} {fingerprint}")
    print(f"{len(one)} artifacts in each home, {len(odd)} differ; {time.monotonic() - start:.0f} s")
    return 1 if odd else 0


def _said(manifest: dict | None) -> tuple | None:
    """What must be equal: the digest, and the bytes of every file."""
    return None if manifest is None else (manifest["digest"], manifest["files"])


if __name__ == "__main__":
    raise SystemExit(main())
