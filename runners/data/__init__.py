"""From pictures and words to packed batches: sources, tokenizer, packing, loader.

Import from the modules themselves: background workers load only what they need (no torch).
"""
