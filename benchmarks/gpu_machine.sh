#!/bin/sh
# gpu_smoke.py or gpu_large.py on a machine with a GPU and without a network, from the wheel.
#   benchmarks/gpu_machine.sh smoke|large [ARGUMENT ...]
# What the machine's Python lacks is in the folder .whl of the repository, as wheels (docs/log/gpu-2026-11.md lists them). The
# project's wheel is built here and installed into a folder of its own, so that nothing comes from the checkout.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
what=$1; shift
place=$(mktemp -d)

pip() { python3 -m pip --disable-pip-version-check "$@"; }
pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$place/site" "$root"/.whl/*.whl
PYTHONPATH="$place/site"; export PYTHONPATH
pip wheel -q --no-index --no-deps --no-build-isolation --no-cache-dir -w "$place/wheel" "$root"
pip install -q --no-index --no-deps --no-cache-dir --target "$place/own" "$place"/wheel/*.whl
PYTHONPATH="$place/own:$place/site"
PYTHONUNBUFFERED=1; export PYTHONUNBUFFERED

mkdir "$place/empty"
cd "$place/empty"
case "$what" in
  smoke) exec python3 "$root/benchmarks/gpu_smoke.py" --work "$place/smoke" "$@" ;;
  large)
    # 81 GB of checkpoints: in memory where that can be had, else on the disk
    mkdir "$place/large"
    mount -t tmpfs -o size=100g tmpfs "$place/large" 2>/dev/null || echo "no tmpfs: $(df -h "$place" | tail -1)" >&2
    exec python3 "$root/benchmarks/gpu_large.py" --work "$place/large/work" --tokenizer "$root/.whl/tokenizer" "$@" ;;
  *) echo "usage: $0 smoke|large [ARGUMENT ...]" >&2; exit 2 ;;
esac
