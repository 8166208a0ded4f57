"""What people start: `python -m runners.train`, and its data."""
