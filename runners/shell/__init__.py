"""The process around a run: command line, errors, locks, child processes."""
