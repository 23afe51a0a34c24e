# shellcheck shell=bash
# The stages of a recipe for one node of GPUs, one command each; its run.sh sources this file. Each stage skips what it has
# finished and resumes.
#
# Reads the variables of run.sh: recipe, prompts, run (the folder), gpus (their number) and the array `with` (the flags
# of every command).
: "${recipe:?}" "${prompts:?}" "${run:?}" "${gpus:?}" "${with[0]:?}"

# 0. Check the recipe before anything starts.
recipe check "${with[@]}"

# 1. Hold out one prompt in a hundred, at most 200. With smoke.yaml: 8 prompts to train on, 2 held out.
mkdir -p "$run/prompts"
if [[ $recipe == *smoke.yaml ]]; then
  head -n 8 "$prompts" > "$run/prompts/train.jsonl"
  sed -n '9,10p' "$prompts" > "$run/prompts/held_out.jsonl"
else
  awk 'NR % 100 != 0 || NR > 20000' "$prompts" > "$run/prompts/train.jsonl"
  awk 'NR % 100 == 0 && NR <= 20000' "$prompts" > "$run/prompts/held_out.jsonl"
fi

# 2. The target answers the prompts, in the recipe's thinking modes. Its reasoning is training data, too.
for split in train held_out; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split"
done
synth stats "$run/synth/train"

# 3. Capture the hidden states of the recipe's layers and the final state over these answers, and check them.
dump plan "${with[@]}" --conversations "$run/synth/train"
for split in train held_out; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/train" --once

# 4. Before hours or days of training: overfit 100 greedy replies, serve the draft, and check that vLLM accepts what training
#    predicts. With `objective: tokens` the replies are memorized fastest.
head -n 100 "$run/prompts/train.jsonl" > "$run/prompts/gate.jsonl"
greedy=("${with[@]}" --set synth.temperature=0)
synth generate "${greedy[@]}" --prompts "$run/prompts/gate.jsonl" --output "$run/synth/gate"
dump run "${greedy[@]}" --conversations "$run/synth/gate" --output "$run/store/gate"
bench gate "${greedy[@]}" --set train.draft.objective=tokens --processes "$gpus" \
  --store "$run/store/gate" --output "$run/gate"

# 5. Train on all GPUs, predict the acceptance length, export the folder that vLLM loads.
torchrun --standalone --nproc-per-node "$gpus" -m train.cli offline "${with[@]}" \
  --store "$run/store/train" --output "$run/draft"
torchrun --standalone --nproc-per-node "$gpus" -m train.cli eval "${with[@]}" --run-folder "$run/draft" \
  --store "$run/store/held_out" --output "$run/eval.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json"

# 6. Measure the held-out prompts without the draft, with the recipe's number of draft tokens and with 1; certificate and
#    model card get the figures. Print the command that serves target and draft.
bench acceptance "${with[@]}" --conversations "$run/synth/held_out" --draft "$run/export" --output "$run/bench"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json" --served "$run/bench" \
  --store "$run/store/train"
train export --check "$run/export"
serve command "${with[@]}" --draft "$run/export" --for production
