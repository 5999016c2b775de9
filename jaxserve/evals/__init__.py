"""Measures what a model answers, in process or over HTTP."""
