"""When a download is restarted, with time as an argument."""

from node.swarm.torrent import PeerAddress
from node.swarm.watchdog import Verdict, Watchdog

GOOD, BAD = PeerAddress("10.0.0.1", 1), PeerAddress("10.0.0.2", 2)


def stalled() -> Watchdog:
    watchdog = Watchdog(3.0, 0.0)
    watchdog.progressed(0.0, 100)
    watchdog.piece_failed()
    assert watchdog.verdict(2.9, [GOOD, BAD]) is Verdict.GO_ON
    assert watchdog.verdict(3.1, [GOOD, BAD]) is Verdict.RESTART
    watchdog.restarted(3.1)
    return watchdog


def test_while_bytes_come_nothing_is_done_though_pieces_fail():
    watchdog = Watchdog(3.0, 0.0)
    for second in range(100):
        watchdog.progressed(float(second), second)
        watchdog.piece_failed()
        assert watchdog.verdict(second + 0.5, [GOOD, BAD]) is Verdict.GO_ON


def test_without_peers_nothing_is_done():
    watchdog = Watchdog(3.0, 0.0)
    watchdog.piece_failed()
    assert watchdog.verdict(1e6, []) is Verdict.GO_ON


def test_a_stall_without_bad_bytes_is_given_longer_and_is_not_careful_afterwards():
    watchdog = Watchdog(3.0, 0.0)
    assert watchdog.verdict(19.0, [GOOD]) is Verdict.GO_ON
    assert watchdog.verdict(21.0, [GOOD]) is Verdict.RESTART
    watchdog.restarted(21.0)
    assert not watchdog.careful


def test_after_bad_bytes_peers_come_one_at_a_time():
    watchdog = stalled()
    assert watchdog.careful
    assert watchdog.next_peer(3.1, [GOOD, BAD]) == GOOD
    watchdog.progressed(4.0, 200)
    assert watchdog.verdict(5.0, [GOOD, BAD]) is Verdict.GO_ON
    # It gives nothing more: the other is connected beside it.
    assert watchdog.verdict(8.0, [GOOD, BAD]) is Verdict.CONNECT_NEXT
    assert watchdog.next_peer(8.0, [GOOD, BAD]) == BAD
    assert watchdog.next_peer(8.0, [GOOD, BAD]) is None


def test_who_was_alone_when_a_piece_failed_is_asked_last():
    watchdog = stalled()
    assert watchdog.next_peer(3.1, [BAD, GOOD]) == BAD
    watchdog.piece_failed()
    assert watchdog.verdict(4.3, [BAD, GOOD]) is Verdict.RESTART
    watchdog.restarted(4.3)
    assert watchdog.next_peer(4.3, [BAD, GOOD]) == GOOD


def test_with_none_but_bad_peers_restarts_become_rare():
    watchdog = stalled()
    assert watchdog.next_peer(3.1, [BAD]) == BAD
    watchdog.piece_failed()
    now, restarts = 3.1, 0
    while now < 1000.0:
        if watchdog.verdict(now, [BAD]) is Verdict.RESTART:
            restarts += 1
            watchdog.restarted(now)
            assert watchdog.next_peer(now, [BAD]) == BAD
            watchdog.piece_failed()
        now += 0.25
    assert 5 < restarts < 40
