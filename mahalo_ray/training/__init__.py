"""Training on Ray Train workers with DeepSpeed ZeRO: one loop, three recipes (sft, reward, policy)."""
