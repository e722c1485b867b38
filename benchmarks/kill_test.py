"""Kill the command line at random points, run it again, and compare what is stored with an uninterrupted run.

    python benchmarks/kill_test.py --kills 20 --seed 0

The graph has a merge, a recovery, sparsity, quantization and evaluation, and a second recipe that distils. Each round
starts an empty home, kills the process group of a run with SIGKILL after a random time (`--in-a-row`: several runs, one
after another), and runs the same command again. It must end well without help, and leave the artifacts of the
uninterrupted run, which has a home of its own: kind, fingerprint, and the hash of each file.

Only kills that hit a run at work count: after its first line, before its end. One that comes too early or too late is
drawn again, from times that narrow down to those at which runs were at work.

There is no --tiny: it is minutes of runs and kills.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression_dags.provenance.artifacts import describe_files

RECIPES = {
    "chain": """name: chain
calibration: {sequences: 24, length: 64}
stages:
  - merge: {method: shortgpt, ratio: 0.20}
  - recover: {method: least-squares}
  - sparsify: {method: sparsegpt, sparsity: 0.5}
  - quantize: {method: gptq, scheme: W4A16, group_size: 16}
""",
    "distilled": """name: distilled
calibration: {sequences: 24, length: 64}
stages:
  - merge: {method: weighted-sum, ratio: 0.20}
  - recover: {method: distill-mp, tokens: 8192, length: 64, batch_tokens: 1024, held_windows: 4, checks: 2}
""",
}
TEXT = "Once upon a time there was a little cat who liked to play in the garden with a red ball. " * 60
#: How a kill may miss.
EARLY, LATE = "nothing was said yet", "the run had ended"
#: Tables over all runs: they name run ids and hosts of the moment.
TABLES = {"leaderboard", "decision_ledger"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-a-row", type=int, default=1, help="kills before the rerun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one, removed at the end)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        desk = options.work or Path(temporary)
        (desk / "recipes").mkdir(parents=True, exist_ok=True)
        for name, text in RECIPES.items():
            (desk / "recipes" / f"{name}.yaml").write_text(text)
        (desk / "cat.txt").write_text(TEXT)
        return torture(desk, options.kills, options.in_a_row, random.Random(options.seed))


def torture(desk: Path, kills: int, in_a_row: int, chance: random.Random) -> int:
    """Exit code: 0 if every rerun ended well with the bytes of the uninterrupted run."""
    start = time.monotonic()
    code, said = finish(desk, desk / "reference")
    if code:
        print(said)
        return code
    whole, expected = time.monotonic() - start, stored(desk / "reference")
    print(f"uninterrupted: {whole:.0f} s, {len(expected)} artifacts")
    wrong, number, home, times = 0, 0, desk / "killed", Times(0.0, whole)
    while number < kills:
        after = times.draw(chance)
        missed, at = killed(desk, home, after)
        if missed:
            print(f"     missed after {after:5.1f} s: {missed}", flush=True)
            times = times.narrowed(after, missed)
            if missed == LATE:  # nothing is left to do in this home
                shutil.rmtree(home)
            continue
        number += 1
        print(f"{number:3d}  killed after {after:5.1f} s: {at}", flush=True)
        if number % in_a_row and number < kills:
            continue
        code, said = finish(desk, home)
        found = stored(home)
        print(f"     rerun: exit {code}, artifacts {'equal' if found == expected else 'DIFFER'}", flush=True)
        wrong += bool(code) or found != expected
        print(said if code else "".join(differences(found, expected)), end="")
        shutil.rmtree(home)
    print("all well" if not wrong else f"{wrong} reruns went wrong")
    return int(bool(wrong))


def command(desk: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    recipes = [word for name in RECIPES for word in ("-r", name)]
    words = [sys.executable, "-m", "compression_dags.cli", "run", "-m", "stories260k", *recipes]
    words += ["--tasks", str(desk / "cat.txt"), "--home", str(home), "--device", "cpu"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH"))))
    settings = {"COMPRESSION_DAGS_RECIPES": str(desk / "recipes"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return words, os.environ | settings


def finish(desk: Path, home: Path) -> tuple[int, str]:
    words, environment = command(desk, home)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=3600)
    return done.returncode, done.stderr[-2000:]


@dataclass(frozen=True)
class Times:
    """Seconds after a start between which a run is at work."""

    first: float
    last: float

    def draw(self, chance: random.Random) -> float:
        return chance.uniform(self.first, self.last)

    def narrowed(self, after: float, missed: str) -> Times:
        """The same without half of what a kill that missed has shown to be too early or too late.

        Runs differ in speed, so that one miss does not rule out all beyond it.
        """
        if missed == EARLY:
            return replace(self, first=(self.first + after) / 2)
        return replace(self, last=(self.last + after) / 2)


def killed(desk: Path, home: Path, after: float) -> tuple[str, str]:
    """Kill a run after some seconds: how it missed, empty if the run was at work; and what it said last."""
    words, environment = command(desk, home)
    log = desk / "log"
    with log.open("w") as said:
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    missed = LATE if process.returncode == 0 else "" if lines else EARLY
    failed = "" if process.returncode in {0, -signal.SIGKILL} else f"it failed by itself ({process.returncode}): "
    return missed, failed + (lines[-1] if lines else "")


def stored(home: Path) -> dict[str, dict[str, str]]:
    """Kind/fingerprint → file → sha256 of every artifact but the tables over all runs."""
    folders = (p for p in (home / "artifacts").glob("*/*") if p.parent.name not in TABLES)
    return {f"{p.parent.name}/{p.name}": {n: f["sha256"] for n, f in describe_files(p).items()} for p in folders}


def differences(found: dict[str, dict[str, str]], expected: dict[str, dict[str, str]]) -> list[str]:
    lines = [f"  missing: {name}\n" for name in sorted(expected.keys() - found.keys())]
    lines += [f"  more: {name}\n" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        lines += [
            f"  {name}: {file}\n"
            for file in sorted(found[name].keys() | expected[name].keys())
            if found[name].get(file) != expected[name].get(file)
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
