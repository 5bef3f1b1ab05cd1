"""What a node keeps for others: only what is valid, merged, fairly sampled, and bounded."""

from __future__ import annotations

import random
import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.discovery.overlay import newest
from node.discovery.storage import RecordStorage, StorageBounds, fair_sample
from protocol.records import MAX_VALUE_BYTES, Name, Provider, RecordKey, name_key, open_value, pack_value, seal
from protocol.signing import SigningKey
from tests.support.discovery.nodes import HOST, a_manifest, provider_value

KEY = name_key("reef", "corpus")
DIGEST = "ab" * 32


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def kept(clock):
    return RecordStorage(bytes(20), clock=clock)


def provider(key=KEY, signer=None, bits=b"\x80", **others):
    payload = Provider(HOST, 7400, 7402, bits, b"")
    return seal(key, payload, signer or SigningKey.generate(), **{"ttl_s": 60} | others)


def name(digest, signer, **others):
    return seal(KEY, Name("corpus", "dataset", digest), signer, ttl_s=60, **others)


def test_records_of_several_publishers_are_merged_and_one_publisher_has_one(kept):
    one, two = SigningKey.generate(), SigningKey.generate()
    assert kept.merge(KEY, pack_value([provider(signer=one, now=time.time() - 5)]))
    assert kept.merge(KEY, pack_value([provider(signer=two)]))
    later = provider(signer=one, bits=b"\xc0")
    assert kept.merge(KEY, pack_value([later]))
    assert {record.publisher for record in kept.records(KEY)} == {one.node_id, two.node_id}
    assert later in kept.records(KEY)


def test_an_older_record_does_not_replace_a_newer_one_nor_undo_a_withdrawal(kept):
    signer = SigningKey.generate()
    old, new = provider(signer=signer, now=time.time() - 5), provider(signer=signer)
    assert kept.merge(KEY, pack_value([new]))
    assert not kept.merge(KEY, pack_value([old]))
    assert kept.records(KEY) == [new]
    gone = provider(signer=signer, now=time.time() + 1, withdrawn=True)
    assert kept.merge(KEY, pack_value([gone]))
    assert not kept.merge(KEY, pack_value([new]))
    assert kept.records(KEY) == [gone]
    assert kept.count() == 0


def test_forged_stale_misplaced_and_oversized_records_have_no_effect(kept):
    good = provider()
    forged = good.packed[:-1] + bytes([good.packed[-1] ^ 1])
    other_body = provider().packed[:-64] + good.packed[-64:]
    elsewhere = provider(key=RecordKey(b"x" * 20)).packed
    stale = provider(now=time.time() - 120).packed
    too_long_alive = provider(ttl_s=10_000).packed
    from_the_future = provider(now=time.time() + 600).packed
    bad = [
        forged,
        other_body,
        elsewhere,
        stale,
        too_long_alive,
        from_the_future,
        bytes(3000),
        b"",
        7,
        None,
        [good.packed],
    ]
    for item in bad:
        assert not kept.merge(KEY, msgpack.packb([item]))
    for value in (None, 5, "text", [], b"\xc1", b"", msgpack.packb({"a": 1}), bytes(20_000), b"\xdd\xff\xff\xff\xff"):
        assert not kept.merge(KEY, value)
    assert kept.count() == 0
    assert kept.size_bytes == 0
    assert kept.answer(KEY) is None
    # Beside a few bad ones a good one counts all the same.
    assert kept.merge(KEY, msgpack.packb([forged, stale, good.packed]))


def test_reading_stops_at_the_fourth_bad_record(monkeypatch):
    checked = []
    monkeypatch.setattr("protocol.records.is_signed_by", lambda *args: checked.append(args))
    assert open_value(KEY, msgpack.packb([provider().packed for _ in range(20)]), now=time.time()) == []
    assert len(checked) == 4


def test_records_expire_and_leave_nothing_behind(kept, clock):
    for ttl_s in (10, 20):
        kept.merge(KEY, pack_value([provider(ttl_s=ttl_s)]))
    kept.merge(RecordKey(b"y" * 20), pack_value([provider(key=RecordKey(b"y" * 20), ttl_s=10)]))
    assert kept.count() == 3
    clock.now += 15
    assert kept.count() == 1
    assert len(kept.records(KEY)) == 1
    clock.now += 15
    assert kept.answer(KEY) is None
    kept.sweep()
    assert kept.size_bytes == 0
    assert (kept._keys, kept._distances, kept._per_publisher) == ({}, [], {})


def test_above_fifty_every_answer_fits_and_is_another_fair_sample(kept):
    signers = [SigningKey.generate() for _ in range(120)]
    for signer in signers:
        assert kept.merge(KEY, pack_value([provider(signer=signer, bits=b"\xff" * 8)]))
    assert kept.count() == 120
    seen: dict[str, int] = {}
    answers = [kept.answer(KEY) for _ in range(60)]
    assert len({value for value, _ in answers}) == 60
    for value, total in answers:
        assert total == 120
        assert len(value) <= MAX_VALUE_BYTES
        records = open_value(KEY, value)
        assert 40 <= len(records) < 60
        for record in records:
            seen[record.publisher] = seen.get(record.publisher, 0) + 1
    # Each is in about 0.4 of 60 samples: mean 24, standard deviation below 4.
    assert set(seen) == {signer.node_id for signer in signers}
    assert min(seen.values()) > 3
    assert max(seen.values()) < 48


def test_a_publisher_of_many_names_does_not_crowd_out_the_others():
    loud = SigningKey.generate()
    quiet = [SigningKey.generate() for _ in range(5)]
    records = [name(f"{n:064x}", loud) for n in range(100)] + [name(DIGEST, signer) for signer in quiet]
    for seed in range(20):
        value = fair_sample(records, 2_000, random.Random(seed))
        assert len(value) <= 2_000
        assert {signer.node_id for signer in quiet} <= {record.publisher for record in open_value(KEY, value)}


def test_withdrawn_records_are_sampled_last():
    records = [provider(withdrawn=True) for _ in range(50)] + [provider() for _ in range(3)]
    sample = open_value(KEY, fair_sample(records, 1_500, random.Random(1)))
    assert sum(not record.withdrawn for record in sample) == 3
    assert len(sample) > 3


@given(size=st.integers(0, 3_000), seed=st.integers(0, 1_000), bits=st.lists(st.integers(0, 900), max_size=8))
def test_a_sample_never_outgrows_its_room(size, seed, bits):
    records = [provider(bits=bytes(n)) for n in bits]
    value = fair_sample(records, size, random.Random(seed))
    assert len(value) <= max(size, 1)


def test_one_publisher_has_a_bounded_share_of_a_key_and_of_the_storage(clock):
    kept = RecordStorage(bytes(20), StorageBounds(subjects_per_key=5, records_per_publisher=12), clock=clock)
    loud = SigningKey.generate()
    assert sum(kept.merge(KEY, pack_value([name(f"{n:064x}", loud)])) for n in range(9)) == 5
    keys = [RecordKey(bytes([n]) * 20) for n in range(20)]
    assert sum(kept.merge(key, pack_value([provider(key, loud)])) for key in keys) == 7
    assert kept.count() == 12
    assert kept.merge(KEY, pack_value([name(DIGEST, SigningKey.generate())]))


def test_a_key_has_a_bounded_number_of_records_and_new_ones_still_come_in(clock):
    kept = RecordStorage(bytes(20), StorageBounds(records_per_key=10), clock=clock)
    ours = provider()
    kept.pin(KEY, ours)
    for _ in range(40):
        latest = provider()
        assert kept.merge(KEY, pack_value([latest]))
        assert latest in kept.records(KEY)
    assert kept.count() == 10
    assert ours in kept.records(KEY)


def test_holders_of_a_key_with_too_many_records_keep_different_ones(clock):
    holders = [RecordStorage(bytes(20), StorageBounds(records_per_key=10), clock=clock) for _ in range(2)]
    for _ in range(40):
        value = pack_value([provider()])
        assert all(holder.merge(KEY, value) for holder in holders)
    one, two = ({record.publisher for record in holder.records(KEY)} for holder in holders)
    assert len(one) == len(two) == 10
    assert one != two


def test_a_full_storage_keeps_near_keys_and_its_own_and_never_outgrows_its_bound(clock):
    kept = RecordStorage(bytes(20), StorageBounds(max_bytes=20_000), clock=clock)
    own_far = RecordKey(b"\xff" * 20)
    ours = provider(own_far)
    kept.pin(own_far, ours)
    keys = [RecordKey(bytes([n]) * 20) for n in range(1, 60)]
    near, far = keys[:10], keys[10:]
    for key in far:
        kept.merge(key, pack_value([provider(key)]))
        assert kept.size_bytes <= 20_000
    assert kept.answer(far[-1]) is None
    for key in near:
        assert kept.merge(key, pack_value([provider(key)]))
        assert kept.size_bytes <= 20_000
    assert all(kept.answer(key) for key in near)
    assert kept.records(own_far) == [ours]
    clock.now += 61
    assert kept.merge(far[-1], pack_value([provider(far[-1], now=clock.now)]))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=40))
def test_counts_and_sizes_stay_right_whatever_is_kept_and_let_go(steps):
    clock = Clock()
    kept = RecordStorage(bytes(20), StorageBounds(max_bytes=12_000), clock=clock)
    signers = _SIGNERS
    for key_byte, signer, later, withdrawn in steps:
        clock.now += later
        key = RecordKey(bytes([key_byte]) * 20)
        record = provider(key, signers[signer], ttl_s=15, now=clock.now, withdrawn=withdrawn)
        if signer == 0:
            kept.pin(key, record)
        else:
            kept.merge(key, pack_value([record]))
        everything = [item for subjects in kept._keys.values() for item in subjects.values()]
        assert kept.size_bytes == sum(len(item.packed) + 1_024 for item in everything)
        assert sum(kept._per_publisher.values()) == len(everything)
        assert kept._distances == sorted(int.from_bytes(key, "big") for key in kept._keys)
        assert all(kept._keys.values())


_SIGNERS = [SigningKey(bytes([n]) * 32) for n in range(4)]


def test_kademlia_finds_nothing_to_publish_again(kept):
    signed = a_manifest()
    key, value = provider_value(signed)
    kept[key] = value
    assert kept[key] == kept.get(key) == value
    assert list(kept.iter_older_than(0)) == []
    assert list(kept) == []
    assert kept.get(KEY) is None
    with pytest.raises(KeyError):
        kept[KEY]


@given(st.data())
def test_a_damaged_value_is_read_without_raising_and_gives_no_other_record(data):
    good = provider(signer=_SIGNERS[1])
    value = bytearray(pack_value([good]))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    assert open_value(KEY, bytes(value), now=time.time()) in ([], [good])


def test_newest_takes_one_record_a_subject():
    signer = SigningKey.generate()
    old, new = provider(signer=signer, now=time.time() - 3), provider(signer=signer)
    other = name(DIGEST, signer)
    assert set(newest([new, old, other])) == {new, other}
