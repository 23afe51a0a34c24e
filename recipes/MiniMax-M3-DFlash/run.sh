#!/usr/bin/env bash
# A DFlash draft for MiniMax-M3 on one node, one command a stage. Each stage skips what it has finished and goes on where
# it was stopped, so this script can be interrupted and run again at any time. README.md beside it: what it costs.
#
#   recipes/MiniMax-M3-DFlash/run.sh PROMPTS.jsonl [RUN_FOLDER [--set KEY=VALUE ...]]
#
#   RECIPE   recipes/MiniMax-M3-DFlash/recipe.yaml; smoke.yaml beside it takes 8 prompts through the same steps
#   GPUS     of this node (default: as many as nvidia-smi lists)
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="${DRAFTLINE_BIN:-$PWD/.venv/bin}:$PATH"

recipe=${RECIPE:-recipes/MiniMax-M3-DFlash/recipe.yaml}
prompts=${1:?PROMPTS.jsonl is missing}
run=${2:-runs/minimax-m3-dflash}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
with=(--recipe "$recipe" --set "serve.args.tensor-parallel-size=$gpus" "${@:3}")

# 0. What can be known to be wrong is found before anything starts.
recipe check "${with[@]}"

# 1. One prompt of each hundred is held out, 200 at most; smoke takes 8 and 2.
mkdir -p "$run/prompts"
if [[ $recipe == *smoke.yaml ]]; then
  head -n 8 "$prompts" > "$run/prompts/train.jsonl"
  sed -n '9,10p' "$prompts" > "$run/prompts/held_out.jsonl"
else
  awk 'NR % 100 != 0 || NR > 20000' "$prompts" > "$run/prompts/train.jsonl"
  awk 'NR % 100 == 0 && NR <= 20000' "$prompts" > "$run/prompts/held_out.jsonl"
fi

# 2. M3 answers them in its three thinking modes. Its thoughts are part of what the draft must guess.
for split in train held_out; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split"
done
synth stats "$run/synth/train"

# 3. The hidden states of five layers and the final one over its own answers, and the proof that they are right.
dump plan "${with[@]}" --conversations "$run/synth/train"
for split in train held_out; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/train" --once

# 4. Before days of training: overfit a hundred greedy replies, serve the draft, and see that vLLM accepts what training
#    predicts. The objective is the tokens', which are learned by heart soonest.
head -n 100 "$run/prompts/train.jsonl" > "$run/prompts/gate.jsonl"
greedy=("${with[@]}" --set synth.temperature=0)
synth generate "${greedy[@]}" --prompts "$run/prompts/gate.jsonl" --output "$run/synth/gate"
dump run "${greedy[@]}" --conversations "$run/synth/gate" --output "$run/store/gate"
bench gate "${greedy[@]}" --set train.objective=tokens --store "$run/store/gate" --output "$run/gate"

# 5. The draft, on all GPUs; what it should be worth; the directory that vLLM loads.
torchrun --standalone --nproc-per-node "$gpus" -m train.cli offline "${with[@]}" \
  --store "$run/store/train" --output "$run/draft"
train eval "${with[@]}" --run "$run/draft" --store "$run/store/held_out" --output "$run/eval.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json"

# 6. What it is worth: the held-out prompts served with the draft and without. And the command to serve it with.
bench acceptance "${with[@]}" --conversations "$run/synth/held_out" --draft "$run/export" --output "$run/bench"
serve command "${with[@]}" --draft "$run/export" --for production
