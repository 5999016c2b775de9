"""Paged attention: one operation, several backends (see api.py)."""
