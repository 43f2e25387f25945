"""Reinforcement learning experiments: thin modules with absl flags, run from a clone."""
