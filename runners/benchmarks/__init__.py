"""What `python -m runners.bench` measures, and how."""
