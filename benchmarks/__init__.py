"""Ratios measured side by side in one run: `python -m benchmarks`, or one of them by name."""
