"""Signs images as made by a model, according to C2PA. Needs the package c2pa-python."""

import importlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any

from wuerstchen.errors import UserError
from wuerstchen.image_files import MADE_BY_A_MODEL

MANIFEST = {
    "claim_generator_info": [{"name": "wuerstchen"}],
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL}]},
        }
    ],
}


class Signer:
    """Signs with a certificate chain and its private key (ES256), both PEM files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises ``UserError`` if the files cannot be used for signing."""
        c2pa: Any = importlib.import_module("c2pa")

        try:
            info = c2pa.C2paSignerInfo(
                alg=b"es256", sign_cert=certificate.read_bytes(), private_key=key.read_bytes(), ta_url=None
            )
            self._lock = threading.Lock()
            self._signer: Any = c2pa.Signer.from_info(info)
        except (OSError, c2pa.C2paError) as error:
            raise UserError(
                f"{certificate} and {key} cannot sign ({error}). Give a certificate chain and its ES256 key, "
                "both in PEM."
            ) from error

    def sign(self, path: Path) -> None:
        """Adds a signed manifest to a PNG. Raises ``UserError`` if that fails."""
        c2pa: Any = importlib.import_module("c2pa")

        signed = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
        try:
            with self._lock, open(path, "rb") as source, open(signed, "x+b") as target:
                c2pa.Builder(json.dumps(MANIFEST)).sign(self._signer, "image/png", source, target)
            os.replace(signed, path)
        except c2pa.C2paError as error:
            raise UserError(f"{path.name} could not be signed ({error}). Check the certificate.") from error
        finally:
            signed.unlink(missing_ok=True)
