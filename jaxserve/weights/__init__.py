"""Checkpoints on disk to parameters on devices: Hugging Face folders and Orbax."""

from jaxserve.weights.convert import convert_checkpoint
from jaxserve.weights.loader import LoadedModel, load_checkpoint, resolve_model

__all__ = ["LoadedModel", "convert_checkpoint", "load_checkpoint", "resolve_model"]
