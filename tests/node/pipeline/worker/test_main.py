"""What an engine process lets through of tensor_iroh's own log."""

from __future__ import annotations

from node.pipeline.worker.main import LogSampler

PKARR = (
    "\x1b[2m2026-11-22T18:28:05.188893Z\x1b[0m \x1b[33m WARN\x1b[0m \x1b[1mpkarr_publish\x1b[0m\x1b[1m{\x1b[0m"
    "\x1b[3mme\x1b[0m\x1b[2m=\x1b[0m6948b1867b\x1b[1m}\x1b[0m\x1b[2m:\x1b[0m \x1b[2miroh::discovery::pkarr"
    "\x1b[0m\x1b[2m:\x1b[0m Failed to publish to pkarr\n"
)
PROBE = "2026-11-22T18:28:07.325531Z  WARN iroh::net_report::reportgen: probe timed out\n"


def test_one_line_of_each_kind_in_ten_minutes_without_colour() -> None:
    sampler = LogSampler()
    assert sampler.take(PKARR, 0.0) == "iroh::discovery::pkarr: Failed to publish to pkarr"
    assert sampler.take(PKARR, 1.0) is None
    assert sampler.take(PROBE, 2.0) == "iroh::net_report::reportgen: probe timed out"
    assert sampler.take(PROBE, 300.0) is None
    assert sampler.take(PKARR, 601.0) == "iroh::discovery::pkarr: Failed to publish to pkarr"


def test_chatter_and_empty_lines_are_dropped_and_others_bounded() -> None:
    sampler = LogSampler()
    assert sampler.take("2026-11-22T18:28:05Z ERROR tensor_iroh: [GET_ADDR] Created NodeTicket: nodeab\n", 0.0) is None
    assert sampler.take("\n", 0.0) is None
    assert sampler.take("no module here at all", 0.0) == "no module here at all"
    said = sampler.take("a::b: " + "x" * 5000, 0.0)
    assert said is not None
    assert len(said) == LogSampler.MAX_CHARS


def test_ever_new_kinds_take_no_memory_without_end() -> None:
    sampler = LogSampler()
    assert all(sampler.take(f"m{i}: text", 0.0) for i in range(10_000))
    assert len(sampler._last) <= LogSampler.MAX_KINDS
