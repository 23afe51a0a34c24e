#!/usr/bin/env bash
# The whole pipeline on a laptop, one command a stage. Each stage skips what it has finished and goes on where it was
# stopped, so this script can be interrupted and run again at any time.
#
#   recipes/Tiny-DFlash/run.sh [RUN_FOLDER [--set KEY=VALUE ...]]        (default: runs/tiny-dflash)
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

recipe=recipes/Tiny-DFlash/recipe.yaml
run=${1:-runs/tiny-dflash}
with=(--recipe "$recipe" --set "target.path=$run/target" "${@:2}")

# 1. A target, made on the spot: a small Qwen3 that explains Python's standard library. And prompts for it.
python recipes/Tiny-DFlash/make_target.py --output "$run"

# 2. The target answers the prompts, in its three thinking modes. vLLM serves it; the token ids are the server's.
for split in train held_out; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split" \
    --thinking-modes enabled,disabled,adaptive
done

# 3. The target's hidden states over its own answers, and the proof that they are what predicted them.
for split in train held_out; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/train" --once

# 4. A draft that guesses 7 tokens at once; what it should be worth; the directory that vLLM loads.
train offline "${with[@]}" --store "$run/store/train" --output "$run/draft"
train eval "${with[@]}" --run "$run/draft" --store "$run/store/held_out" --output "$run/eval.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json"

# 5. What it is worth: the held-out prompts served with the draft and without.
bench acceptance "${with[@]}" --conversations "$run/synth/held_out" --draft "$run/export" --output "$run/bench"
bench report --target "$run/target" \
  --synth-train "$run/synth/train" --synth-held-out "$run/synth/held_out" \
  --store-train "$run/store/train" --store-held-out "$run/store/held_out" \
  --run "$run/draft" --eval "$run/eval.json" --served "$run/bench" --output "$run/report.json"
