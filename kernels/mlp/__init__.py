"""Gated activations and gated MLPs."""
