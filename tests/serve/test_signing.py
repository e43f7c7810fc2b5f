"""Signed images, if c2pa-python is installed."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.image_files import MADE_BY_A_MODEL, read_settings
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.results import Results

EXTENSIONS = """[req]
distinguished_name=dn
prompt=no
[dn]
O=Test
CN=Test CA
[ca]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign,cRLSign
subjectKeyIdentifier=hash
[leaf]
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=emailProtection
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
"""


@pytest.fixture
def certificate(tmp_path):
    """A chain and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    (tmp_path / "x.cnf").write_text(EXTENSIONS)
    script = """
    openssl ecparam -name prime256v1 -genkey -noout -out ca.key
    openssl req -x509 -new -key ca.key -days 9 -config x.cnf -extensions ca -out ca.pem
    openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out leaf.key
    openssl req -new -key leaf.key -subj /O=Test/CN=Leaf -out leaf.csr
    openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 9 -extfile x.cnf \
        -extensions leaf -out leaf.pem
    cat leaf.pem ca.pem > chain.pem
    """
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "chain.pem", tmp_path / "leaf.key"


def test_signed_images_say_that_a_model_made_them(certificate, tmp_path):
    """Bugs: a manifest that readers reject, or settings or pixels lost by signing."""
    c2pa = pytest.importorskip("c2pa")
    from wuerstchen.serve.signing import Signer

    folder = tmp_path / "results"
    results = Results(folder, "abc123", seconds=60.0, max_bytes=10**7, signer=Signer(*certificate))
    name = results.save(Image.new("RGB", (64, 64), "red"), {"seed": 3})
    assert [path.name for path in folder.iterdir()] == [name]
    with open(folder / name, "rb") as file, c2pa.Reader("image/png", file) as reader:
        read = json.loads(reader.json())
    (manifest,) = read["manifests"].values()
    assert MADE_BY_A_MODEL in json.dumps(manifest["assertions"])
    # The only problem is that nobody trusts this authority.
    assert {status["code"] for status in read["validation_status"]} == {"signingCredential.untrusted"}
    assert read_settings(folder / name) == {"seed": 3}
    with Image.open(folder / name) as image:
        assert image.getpixel((5, 5)) == (255, 0, 0)


def test_unusable_certificates_are_refused_at_the_start(tmp_path):
    pytest.importorskip("c2pa")
    from wuerstchen.serve.signing import Signer

    (tmp_path / "x.pem").write_text("nonsense")
    for certificate in (tmp_path / "x.pem", tmp_path / "nowhere.pem"):
        with pytest.raises(UserError, match="cannot sign"):
            Signer(certificate, tmp_path / "x.pem")


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install \"wuerstchen\[c2pa\]\""):
        ServeConfig(c2pa_certificate=Path("x"), c2pa_key=Path("y"))
