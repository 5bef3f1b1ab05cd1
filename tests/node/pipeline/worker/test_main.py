"""What an engine process lets through of tensor_iroh's own log."""

from __future__ import annotations

from node.pipeline.worker.main import Thinner

PKARR = (
    "\x1b[2m2026-11-22T18:28:05.188893Z\x1b[0m \x1b[33m WARN\x1b[0m \x1b[1mpkarr_publish\x1b[0m\x1b[1m{\x1b[0m"
    "\x1b[3mme\x1b[0m\x1b[2m=\x1b[0m6948b1867b\x1b[1m}\x1b[0m\x1b[2m:\x1b[0m \x1b[2miroh::discovery::pkarr"
    "\x1b[0m\x1b[2m:\x1b[0m Failed to publish to pkarr\n"
)
PROBE = "2026-11-22T18:28:07.325531Z  WARN iroh::net_report::reportgen: probe timed out\n"


def test_one_line_of_each_kind_in_ten_minutes_without_colour() -> None:
    thinner = Thinner()
    assert thinner.take(PKARR, 0.0) == "iroh::discovery::pkarr: Failed to publish to pkarr"
    assert thinner.take(PKARR, 1.0) is None
    assert thinner.take(PROBE, 2.0) == "iroh::net_report::reportgen: probe timed out"
    assert thinner.take(PROBE, 300.0) is None
    assert thinner.take(PKARR, 601.0) == "iroh::discovery::pkarr: Failed to publish to pkarr"


def test_chatter_and_empty_lines_are_dropped_and_others_bounded() -> None:
    thinner = Thinner()
    assert thinner.take("2026-11-22T18:28:05Z ERROR tensor_iroh: [GET_ADDR] Created NodeTicket: nodeab\n", 0.0) is None
    assert thinner.take("\n", 0.0) is None
    assert thinner.take("no module here at all", 0.0) == "no module here at all"
    said = thinner.take("a::b: " + "x" * 5000, 0.0)
    assert said is not None
    assert len(said) == Thinner.MAX_CHARS


def test_ever_new_kinds_take_no_memory_without_end() -> None:
    thinner = Thinner()
    assert all(thinner.take(f"m{i}: text", 0.0) for i in range(10_000))
    assert len(thinner._last) <= Thinner.MAX_KINDS
