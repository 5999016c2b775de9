"""The small model that ships with the project, and everything that makes it."""

from pathlib import Path

EMBEDDED_MODEL_NAME = "jaxserve-embedded"
"""What the embedded model is called in the API."""


def checkpoint_path() -> Path:
    """Folder of the embedded model's checkpoint."""
    return Path(__file__).parent / "checkpoint"
