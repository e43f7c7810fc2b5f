"""Makes diffusers' own loaders find Würstchen again."""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType

from wuerstchen.errors import UserError

_PUBLISHED = "diffusers.pipelines.wuerstchen"
_MOVED = "diffusers.pipelines.deprecated.wuerstchen"
_NETWORKS = ("WuerstchenPrior", "WuerstchenDiffNeXt", "PaellaVQModel")


def register() -> None:
    """Makes the installed diffusers load Würstchen again, with its own classes.

    Since version 0.38, diffusers looks for the library ``wuerstchen`` of published folders in the wrong
    place, and for the networks of folders that it wrote itself at its top level, where they never were. This
    breaks Stable Cascade's Stage A too. Imports from the old path work again as well. Calling it twice is
    harmless. Raises ``UserError`` if diffusers is not installed or has no Würstchen.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "diffusers is not installed, so nothing can be registered. Run: pip install diffusers"
        )
    top, pipelines = importlib.import_module("diffusers"), importlib.import_module("diffusers.pipelines")
    package = _package()
    setattr(pipelines, "wuerstchen", package)  # noqa: B010, type checkers do not know the attribute
    for module in pkgutil.iter_modules(package.__path__):
        here = importlib.import_module(f"{package.__name__}.{module.name}")
        sys.modules.setdefault(f"{_PUBLISHED}.{module.name}", here)
    sys.modules.setdefault(_PUBLISHED, package)
    for name in _NETWORKS:
        if not hasattr(top, name):
            setattr(top, name, getattr(package, name))


def _package() -> ModuleType:
    for name in (_PUBLISHED, _MOVED):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # something else is missing
    raise UserError("The installed diffusers has no Würstchen any more. Install diffusers==0.42.1.")
