"""Benchmarks: `python -m bench NAME [--quick] [--json FILE]`.

Each compares with a named peer in the same run and publishes a ratio with its spread.
"""
