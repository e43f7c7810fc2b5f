"""Folders of ppdiffusers: not read yet."""

from pathlib import Path

from wuerstchen.checkpoints import diffusers

PADDLE = diffusers.TORCH


def is_paddle(folder: Path) -> bool:
    """Whether a folder names Paddle's libraries."""
    return False
