"""Sources of records: the shapes task, LLaVA files, plain text; their digests and splits."""
