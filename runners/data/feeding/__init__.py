"""Loaders: encoding and packing in processes beside training."""
