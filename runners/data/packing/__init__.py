"""From documents to rows and batches of static shapes."""
