"""The safety filter: a user-supplied function that checks prompts and images."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from PIL import Image

from wuerstchen.errors import UserError

Filter = Callable[[str, Image.Image | None], str | None]
"""Called with (prompt, None) before generation and (prompt, image) after it. Returns the reason to refuse it,
or None."""


def load_filter(name: str) -> Filter:
    """Imports ``module:function``. Raises ``UserError``."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # users keep their module in the current folder
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind("", None)
    except Exception as error:
        raise UserError(
            f"filter {name!r} cannot be used ({error}). Give it as module:function, where the function takes "
            "a prompt and an image."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    return found
