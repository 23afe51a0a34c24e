#!/usr/bin/env bash
# The whole pipeline on a laptop, one command per stage. Each stage skips what it has finished and resumes, so you can
# interrupt this script and run it again.
#
#   recipes/Tiny-DFlash/run.sh [RUN_FOLDER [--set KEY=VALUE ...]]        (default: runs/tiny-dflash)
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

recipe=recipes/Tiny-DFlash/recipe.yaml
run=${1:-runs/tiny-dflash}
with=(--recipe "$recipe" --set "target.path=$run/target" "${@:2}")

# 1. Make the target, a small Qwen3 that explains Python's standard library, and prompts for it.
python recipes/Tiny-DFlash/make_target.py --output "$run"

# 2. The target answers the prompts in its three thinking modes, served by vLLM. Token ids come from the server.
for split in train held_out; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split" \
    --thinking-modes enabled,disabled,adaptive
done

# 3. Capture the target's hidden states over its own answers, and check that they predict these answers.
for split in train held_out; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/train" --once

# 4. Train a draft of 7 draft tokens, predict its acceptance length, export the folder that vLLM loads.
train offline "${with[@]}" --store "$run/store/train" --output "$run/draft"
train eval "${with[@]}" --run "$run/draft" --store "$run/store/held_out" --output "$run/eval.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json"

# 5. Measure the held-out prompts without the draft, with 7 draft tokens and with 1. Certificate and model card get the
#    figures, and the number of draft tokens to serve at each concurrency.
bench acceptance "${with[@]}" --conversations "$run/synth/held_out" --draft "$run/export" --output "$run/bench"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json" --served "$run/bench" \
  --store "$run/store/train"
train export --check "$run/export"
bench report --target "$run/target" \
  --synth-train "$run/synth/train" --synth-held-out "$run/synth/held_out" \
  --store-train "$run/store/train" --store-held-out "$run/store/held_out" \
  --run "$run/draft" --eval "$run/eval.json" --served "$run/bench" --output "$run/report.json"
