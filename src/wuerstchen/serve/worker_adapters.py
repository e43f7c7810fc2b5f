"""The adapters of a worker's model: those of all images, and the one that a batch names."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.sampling import adapter_named
from wuerstchen.serve.adapters import AdapterFolder

if TYPE_CHECKING:
    from wuerstchen.pipeline import Wuerstchen


class WorkerAdapters:
    """Loads the adapters of a batch. The model keeps those that were used last in memory."""

    def __init__(self, model: "Wuerstchen", always: tuple[str, ...], folder: Path | None) -> None:
        """``always``: adapters of all images, as ``FILE`` or ``FILE:SCALE``. Raises ``UserError``."""
        self.model = model
        self.always = dict(map(adapter_named, always))
        self.folder = None if folder is None else AdapterFolder(folder)
        self._notices: list[str] = []
        """About the adapter that a batch has named. Those of the operator's adapters are not for clients."""

    def use(self, name: str | None, strength: float) -> list[str]:
        """Makes the adapter of this name, and those of all images, the only ones.

        Returns notices for the clients. Raises ``UserError`` if it does not exist or does not fit the model.
        Clients do not learn the folder.
        """
        wanted = dict(self.always)
        path = None
        if name is not None:
            if self.folder is None:
                raise UserError("this service has no adapters. Omit lora.")
            path = self.folder.find(name)
            wanted[path] = strength

        def without_folder(text: str) -> str:
            return text if path is None else text.replace(str(path), f"lora {name!a}")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if self.model.use_loras(wanted):
                    found = [str(w.message) for w in caught if issubclass(w.category, UserNotice)]
                    own = [text for text in found if path is not None and str(path) in text]
                    self._notices = list(map(without_folder, own))
            except UserError as error:
                raise UserError(without_folder(str(error))) from error
        return self._notices
