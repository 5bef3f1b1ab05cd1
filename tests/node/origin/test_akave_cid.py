"""The root CID, against what the real akavesdk (main, efc9854) gave for the same bytes."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.origin.akave.cid import BLOCK_BYTES, CHUNK_BYTES, RootCid, same_cid
from tests.support.origins.root_cid import root_cid_of

# random.Random(size).randbytes(size) -> root CID
FROM_THE_SDK = {
    1: "bafybeibe6h3j4r4exxwisj52sytsul3mh4ui64kxsahbmuehdjnmhj774q",
    127: "bafybeibj7z5e3zglqyx2lhmuoefneqz7bj3lekd6h2xqqe5wf7vgz3dqpi",
    128: "bafybeie2mwchkguwwxv4yq6mu3ryy37unutygwuvqlqqqfwcymtd2soe5i",
    999_999: "bafybeifurkxxinihgtr4tezxfq4acrondlnhxrncknxzxwlkiau5kyzquq",
    1_000_000: "bafybeied7zxeaogy4d75t2ykce2vmqepuuugtzxlagfilpnk23nygyfmiy",
    1_000_001: "bafybeiflqkk3ii6s2yg3mnjpgvbhaq4w454q2od6sk7t7gon6zvtekhnmi",
    2_000_000: "bafybeihkxtmimoksy55wueiipgcjb6rxqu54wi322zgyo3kwyfldfrrrse",
    31_999_999: "bafybeih3yxl2ajkdcsnv7ntn3b7tmwuslm3l6lsmtxdca35mkdbwada5t4",
    32_000_000: "bafybeighlkswlixpnskizog7nlwqsjc542qcvhgognwlvaorowoq4osvlm",
    32_000_001: "bafybeiegza3fxhamaoekwoenqvq4zoamoxswc3rh2ibnea4jstijop62gq",
    65_000_123: "bafybeig7k5a5zhuunmngn4mkrioueyjvtpsduu6dpx6p7caovteg74ikxa",
}


@functools.cache
def bytes_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", FROM_THE_SDK)
def test_what_the_sdk_gave(size: int) -> None:
    assert root_cid_of([bytes_of(size)]) == FROM_THE_SDK[size]


def test_of_nothing() -> None:
    with pytest.raises(ValueError, match="without bytes"):
        root_cid_of([])


def test_one_chunk_is_the_chunk_and_two_are_a_root() -> None:
    # A file of one chunk has the chunk's CID, and no node on top, which would have another one.
    assert FROM_THE_SDK[CHUNK_BYTES] == root_cid_of([bytes_of(CHUNK_BYTES)])
    assert root_cid_of([bytes_of(CHUNK_BYTES), b"x"]) != FROM_THE_SDK[CHUNK_BYTES]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 1_200_000), max_size=6))
def test_however_it_is_cut(cuts: list[int]) -> None:
    data = bytes_of(2_000_000)
    root, rest = RootCid(), memoryview(data)
    for cut in cuts:
        root.update(rest[:cut])
        rest = rest[cut:]
    root.update(rest)
    assert root.size == len(data)
    assert root.text() == FROM_THE_SDK[2_000_000]
    assert root.text() == FROM_THE_SDK[2_000_000], "asked twice, it is the same"


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, BLOCK_BYTES + 499), bit=st.integers(0, 7))
def test_any_bit_matters(place: int, bit: int) -> None:
    data = bytearray(bytes_of(BLOCK_BYTES + 500))
    whole = root_cid_of([data])
    data[place] ^= 1 << bit
    assert root_cid_of([data]) != whole


def test_one_cid_in_two_bases() -> None:
    base32, base58 = (
        "bafybeihgongeddt4hb22vbvurwocayypfplofkegr5laazn5ae5tpoojfe",
        "zdj7WkwUpVHL94FH7QWZxm141TyNk8cePN1YYWvSevyLqDVur",
    )
    assert same_cid(base32, base58)
    assert same_cid(base58, base32)
    assert not same_cid(base32, FROM_THE_SDK[1])
    assert not same_cid(base58.replace("z", "z2", 1), base32)
    for other in ("", "b", "z", "b0", "z0", "none", "Qm"):
        assert not same_cid(base32, other)
        assert not same_cid(other, base32)
    assert not same_cid("", "none")
