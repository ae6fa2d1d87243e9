#!/usr/bin/env bash
# One run of the paper's setting: ./train.sh METHOD MODEL SEED [verl overrides]
#   for m in grpo clip-higher dcpo bandpo-kl no-clip dppo-kl; do for s in 0 1 2; do ./train.sh $m qwen2.5-3b $s; done; done
set -euo pipefail
if [ $# -lt 3 ]; then
  here=$(dirname "$0")
  echo "usage: $0 METHOD MODEL SEED [verl overrides]" >&2
  echo "methods: $(cd "$here/config/method" && ls | sed 's/.yaml//' | tr '\n' ' ')" >&2
  echo "models:  $(cd "$here/config/model" && ls | sed 's/.yaml//' | tr '\n' ' ')" >&2
  exit 2
fi
config=$(cd "$(dirname "$0")/config" && pwd)
method=$1 model=$2 seed=$3
shift 3
exec python -m verl.trainer.main_ppo --config-path="$config" --config-name=paper method="$method" model="$model" seed="$seed" "$@"
