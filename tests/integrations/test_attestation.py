"""`verify --attest`: an in-toto Statement that others read, sign and check."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from model_signing import signing, verifying

import rewrite
from rewrite.cli.commands import main
from rewrite.errors import UsageError
from rewrite.integrations import attestation
from rewrite.loaders.asked import NEWEST
from tests.support import FIXTURES

SOURCE = FIXTURES / "llmcompressor-qwen3_5-vl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """OUT, and its Statement as the command line writes it."""
    folder = tmp_path_factory.mktemp("attested")
    out, file = folder / "out", folder / "statement.json"
    rewrite.convert(SOURCE, out)
    done = CliRunner().invoke(main, ["verify", str(SOURCE), str(out), "--attest", str(file), "--quiet"])
    assert done.exit_code == 0, done.output
    return out, file.read_text()


def test_in_toto_reads_it(made: tuple[Path, str]) -> None:
    """Their own parser takes every field, and their check holds."""
    found = json_format.Parse(made[1], statement_pb2.Statement())
    Statement.copy_from_pb(found).validate()
    assert {each.name for each in found.subject} == {path.name for path in made[0].iterdir()}


def test_it_says_what_was_found(made: tuple[Path, str]) -> None:
    predicate = json.loads(made[1])["predicate"]
    assert predicate["ok"] is True
    assert {check["name"]: check["verdict"] for check in predicate["checks"]}["untouched"] == "ok"
    assert predicate["verifier"] == {"name": "rewrite", "version": rewrite.__version__}
    assert (predicate["in"], predicate["out"]) == (SOURCE.name, "out")
    assert {"loader": "vLLM", "versions": "0.17.0 to 0.19.1", "before": "garbled", "after": "exact"} in predicate[
        "loaders"
    ]
    assert str(made[0].parent) not in made[1]


def test_the_same_run_writes_the_same_bytes(made: tuple[Path, str]) -> None:
    found = rewrite.verify(SOURCE, made[0], digest=True, engines=NEWEST.engines)
    assert attestation.dump(found) == made[1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key, as PEM."""
    folder, key = tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_model_signing_agrees_on_every_digest(made: tuple[Path, str], keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Signed and checked with a local key; what it signed are the digests that are attested."""
    signature = tmp_path / "model.sig"
    signing.Config().use_elliptic_key_signer(private_key=keys[0]).sign(made[0], signature)
    verifying.Config().use_elliptic_key_verifier(public_key=keys[1]).verify(made[0], signature)
    envelope: dict[str, Any] = json.loads(signature.read_text())["dsseEnvelope"]
    signed = json.loads(base64.b64decode(envelope["payload"]))
    theirs = {each["name"]: each["digest"] for each in signed["predicate"]["resources"]}
    ours = {each["name"]: each["digest"]["sha256"] for each in json.loads(made[1])["subject"]}
    assert theirs == ours


def test_a_plain_key_signs_it(made: tuple[Path, str], keys: tuple[Path, Path]) -> None:
    private = serialization.load_pem_private_key(keys[0].read_bytes(), None)
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = private.sign(made[1].encode(), ec.ECDSA(hashes.SHA256()))
    public.verify(signature, made[1].encode(), ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("option", ["--quick", "--no-digest"])
def test_nothing_is_attested_without_digests(made: tuple[Path, str], tmp_path: Path, option: str) -> None:
    file = tmp_path / "statement.json"
    done = CliRunner().invoke(main, ["verify", str(SOURCE), str(made[0]), "--attest", str(file), option])
    assert done.exit_code == 2
    assert "--attest needs the digests" in done.output
    assert not file.exists()
    with pytest.raises(UsageError, match="no digests"):
        attestation.statement(rewrite.verify(SOURCE, made[0], quick=True))


def test_a_failed_verification_is_not_attested(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "statement.json"
    rewrite.convert(SOURCE, out)
    (out / "tokenizer.json").write_text("{}")
    done = CliRunner().invoke(main, ["verify", str(SOURCE), str(out), "--attest", str(file)])
    assert done.exit_code == 1
    assert not file.exists()
    with pytest.raises(UsageError, match="not verified"):
        attestation.statement(rewrite.verify(SOURCE, out, digest=True))
