"""Measurements, run as `python -m bench.NAME`. They assert nothing about time."""
