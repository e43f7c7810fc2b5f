"""The safety filter: a function of the user's that is asked about prompts and images."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from PIL import Image

from wuerstchen.errors import UserError

Filter = Callable[[str, Image.Image | None], str | None]
"""(prompt, None) before drawing and (prompt, picture) after it → why it is refused, or None."""


def load_filter(name: str) -> Filter:
    """The function that ``module:function`` names. Raises ``UserError``."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # where one's own module lies
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind("", None)
    except Exception as error:
        raise UserError(
            f"filter {name!r} is wrong because it cannot be used ({error}); give module:function, a function "
            "of a prompt and a picture"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    return found
