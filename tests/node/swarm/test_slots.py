"""How many peers a seed serves at once, with time as an argument."""

from node.swarm.swarm import MAX_SLOTS, MIN_SLOTS, UploadSlots

LIMIT = 8_000_000


def run(slots: UploadSlots, rates: list[int], served: int | None = None) -> None:
    now, total = 0.0, 0
    slots.observe(now, total, slots.slots)
    for rate in rates:
        now, total = now + 1.0, total + rate
        slots.observe(now, total, slots.slots if served is None else served)


def test_a_seed_that_fills_its_limit_keeps_one_slot():
    slots = UploadSlots(LIMIT, 1)
    run(slots, [LIMIT // 2] + [LIMIT * 9 // 10] * 20)
    assert slots.slots == 1


def test_a_slow_peer_in_the_only_slot_does_not_keep_the_others_out():
    slots = UploadSlots(LIMIT, 1)
    run(slots, [200_000] * 4)
    assert slots.slots > 1
    run(slots, [200_000] * 200)
    assert slots.slots == MAX_SLOTS


def test_free_slots_are_not_added_to():
    slots = UploadSlots(LIMIT, 2)
    run(slots, [0] * 20, served=1)
    assert slots.slots == 2


def test_slots_are_closed_again_but_not_to_one():
    slots = UploadSlots(0, 1)
    run(slots, [1_000_000] * 8)
    assert slots.slots > 3
    run(slots, [100_000_000] * 20)
    assert slots.slots == MIN_SLOTS
