"""The adapters of a worker's model: those of all images, and the one that a batch names."""

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.sampling import adapters_named
from wuerstchen.serve.adapters import AdapterFolder

if TYPE_CHECKING:
    from wuerstchen.pipeline import Wuerstchen

log = logging.getLogger("wuerstchen.serve")


class WorkerAdapters:
    """Loads the adapters of a batch. The model keeps those that were used last in memory."""

    def __init__(self, model: "Wuerstchen", always: tuple[str, ...], folder: Path | None) -> None:
        """``always``: adapters of all images, as ``FILE`` or ``FILE:SCALE``. Raises ``UserError``."""
        self.model = model
        self.always = dict(adapters_named(always))
        self.folder = None if folder is None else AdapterFolder(folder, self.always)
        self._was_used = False
        """Whether the operator's adapters could be loaded once. Errors before are for the operator."""
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
            if path is None or self.folder is None:
                return text
            return text.replace(str(path), f"lora {name!a}").replace(f"{self.folder.folder}{os.sep}", "")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if self.model.use_loras(wanted):
                    found = [str(w.message) for w in caught if issubclass(w.category, UserNotice)]
                    own = [text for text in found if path is not None and str(path) in text]
                    self._notices = list(map(without_folder, own))
                self._was_used = True
            except UserError as error:
                if self._was_used and (name is None or not self._loads_always()):
                    log.error("an adapter of all images cannot be loaded: %s", error)
                    raise UserError(
                        "an adapter that this service uses for all images cannot be loaded any more. "
                        "Tell its operator."
                    ) from error
                raise UserError(without_folder(str(error))) from error
        return self._notices

    def _loads_always(self) -> bool:
        """Whether the operator's adapters can be loaded without others."""
        try:
            self.model.use_loras(self.always)
        except UserError:
            return False
        return True
