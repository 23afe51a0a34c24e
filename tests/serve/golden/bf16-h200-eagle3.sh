VLLM_ENGINE_READY_TIMEOUT_S=3600 \
VLLM_NO_USAGE_STATS=1 \
vllm serve MiniMaxAI/MiniMax-M3 \
  --served-model-name target \
  --host 127.0.0.1 \
  --port 8000 \
  --max-model-len 196608 \
  --block-size 128 \
  --language-model-only \
  --tensor-parallel-size 8 \
  --reasoning-parser minimax_m3 \
  --tool-call-parser minimax_m3 \
  --enable-auto-tool-choice \
  --max-cudagraph-capture-size 256 \
  --speculative-config '{"method": "eagle3", "model": "Inferact/MiniMax-M3-EAGLE3", "num_speculative_tokens": 3, "attention_backend": "FLASH_ATTN"}'
