"""Rollouts from a vLLM server: a process of its own here, or one that runs elsewhere."""
