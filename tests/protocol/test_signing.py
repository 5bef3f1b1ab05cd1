import stat
from pathlib import Path

import pytest

from protocol.ids import NodeId
from protocol.signing import SIGNATURE_BYTES, SigningKey, is_signed_by


def test_rfc_8032_test_2() -> None:
    key = SigningKey(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.node_id == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = key.sign(b"\x72")
    assert signature.hex().startswith("92a009a9f0d4cab8720e820b5f642540")
    assert len(signature) == SIGNATURE_BYTES
    assert is_signed_by(key.node_id, b"\x72", signature)
    assert not is_signed_by(key.node_id, b"\x73", signature)
    assert not is_signed_by(SigningKey.generate().node_id, b"\x72", signature)
    assert not is_signed_by(key.node_id, b"\x72", b"")
    assert not is_signed_by(NodeId("zz"), b"\x72", signature)


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = SigningKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load_or_create(path).node_id == key.node_id
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_no_new_identity(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="32"):
        SigningKey.load_or_create(path)
    assert path.read_bytes() == content
