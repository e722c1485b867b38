"""A Llama-2-7B-shaped model through the command line of the installed wheel: seconds and peak memory of every asset.

The weights are random, the tokenizer is one that is given. A second, equal call shows what a rerun of hits costs.
Run it from an empty directory, as benchmarks/gpu_machine.sh does. It needs 81 GB below --work: best a folder in memory.
`--tiny` still needs the installed wheel and a tokenizer, and takes a minute, so the suite does not run it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_smoke import installed
from random_llama import write_random

RECIPES = ("shortgpt-20-ls", "gptq-w4", "sparsegpt-50", "admm-50")
SHAPE = {"layers": 32, "hidden": 4096, "inter": 11008, "heads": 32, "kv": 32, "vocab": 49152, "length": 2048}
TINY = {"layers": 5, "hidden": 64, "inter": 96, "heads": 4, "kv": 2, "length": 512}
#: Columns of the table that are read from a manifest, where it has them.
MEMORY = ("peak_memory_mb", "peak_device_memory_mb")


def write_model(folder: Path, args: argparse.Namespace) -> None:
    write_random(folder, args)
    for path in args.tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()


def run(args: argparse.Namespace, text: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of one `run` with all recipes, and what it printed.

    Raises:
        SystemExit: it failed; its last lines are printed.
    """
    names = [word for name in args.recipes for word in ("-r", name)]
    command = [sys.executable, "-m", "compression_dags.cli", "run", "-m", str(args.work / "model"), *names]
    command += ["--tasks", str(text), "--home", str(args.work / "home"), "--device", args.device, "--json"]
    command += ["--sequences", str(args.sequences), "--length", str(args.length)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=args.work / "empty", stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"run ended with {done.returncode} after {seconds:.0f} s")
    return seconds, json.loads(done.stdout)


def add(args: argparse.Namespace) -> float:
    """Seconds that importing the model takes: every check, and a copy.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "compression_dags.cli", "models", "add", str(args.work / "model")]
    start = time.monotonic()
    done = subprocess.run([*command, "--home", str(args.work / "home"), "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"models add ended with {done.returncode}")
    facts = json.loads(done.stdout)
    print(f"import: {facts.get('import_seconds')} s of {time.monotonic() - start:.1f} s with start", flush=True)
    return time.monotonic() - start


def assets(home: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every stored artifact, the oldest first, named by its asset where the run printed one."""
    names: dict[str, str] = {}
    for recipe, said in found["recipes"].items():
        for asset, entry in said["assets"].items():
            names.setdefault(entry["fingerprint"], f"{asset} {recipe}")
    manifests = sorted((home / "artifacts").glob("*/*/manifest.json"), key=lambda p: p.stat().st_mtime)
    rows = []
    for path in manifests:
        manifest = json.loads(path.read_text())
        size = sum(f.stat().st_size for f in path.parent.rglob("*") if f.is_file())
        asset = names.get(path.parent.name, path.parent.parent.name)
        rows.append(
            {"asset": asset, "seconds": manifest["seconds"], "bytes": size} | {k: manifest.get(k) for k in MEMORY}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| asset | seconds | GB | host GB | device GB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        memory = ["" if row[k] is None else f"{row[k] / 1024:.1f}" for k in MEMORY]
        cells = [row["asset"], f"{row['seconds']:.1f}", f"{row['bytes'] / 1e9:.1f}", *memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that does not exist yet; removed at the end")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and its config")
    parser.add_argument("--out", type=Path, default=None, help="everything, as JSON")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--characters", type=int, default=400_000, help="of the text that is scored")
    for name, value in (SHAPE | {"sequences": 128}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU does in a minute")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY | {"sequences": 8})
    args.work, args.tokenizer = args.work.absolute(), args.tokenizer.absolute()
    if args.work.exists():
        parser.error(f"--work {args.work} exists")
    return args


def main() -> None:
    args = arguments()
    shipped = installed() / "shipped"
    (args.work / "empty").mkdir(parents=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        text = args.work / "text.txt"
        text.write_text((shipped / "data" / "heldout" / "novels.txt").read_text(encoding="utf-8")[: args.characters])
        start = time.monotonic()
        write_model(args.work / "model", args)
        print(f"the model was written in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        imported = add(args)
        first, found = run(args, text)
        rows = assets(args.work / "home", found)
        print(table(rows), flush=True)
        again, _ = run(args, text)
        print(f"first call {first:.0f} s, second (all hits) {again:.1f} s")
        if args.out:
            args.out.write_text(
                json.dumps({"import": imported, "first": first, "again": again, "assets": rows, "run": found}, indent=1)
            )
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
