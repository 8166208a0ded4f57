"""Optimizer steps over many tensors at once."""
