"""P-EAGLE: EAGLE3's layers, run once for all draft tokens."""
