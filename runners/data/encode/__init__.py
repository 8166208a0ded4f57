"""From records to documents of tokens and patches."""
