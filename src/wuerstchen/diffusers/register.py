"""Würstchen for diffusers' own loaders, which lost it."""

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
    """Lets the diffusers that is installed load Würstchen again, with its own classes.

    Since 0.38 it looks for the published folders' library ``wuerstchen`` where it no longer is, and for the
    networks of the folders it writes itself at its top level, where they never were; Stable Cascade's Stage A
    is lost with them. Imports by the old path work again too. Calling it twice does nothing more. Raises
    ``UserError`` if diffusers is not installed or has no Würstchen.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("diffusers is not installed, so nothing can be registered; pip install diffusers")
    top, pipelines = importlib.import_module("diffusers"), importlib.import_module("diffusers.pipelines")
    package = _package()
    setattr(pipelines, "wuerstchen", package)  # noqa: B010, no attribute that a type checker knows
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
    raise UserError("this diffusers has no Würstchen any more; install diffusers==0.42.1")
