"""What a reader's window says is fetched next."""

from __future__ import annotations

from pathlib import Path

from torch_bridge.shards.sources.interface import FetchedFile
from torch_bridge.shards.window import ShardWindow


def test_the_first_shard_has_the_line_for_itself_until_it_is_here_or_takes_long() -> None:
    window = ShardWindow(["a", "b", "c"], (), 0, 1)
    window.alone_until = 10.5
    assert window.next(10.0, 2) == "a"
    window.on_the_way.add("a")
    assert window.next(10.4, 2) is None
    assert window.next(10.6, 2) == "b"
    window.on_the_way.discard("a")
    window.came("a", FetchedFile(Path("a"), "origin", 0.1))
    assert window.next(10.4, 2) == "b"
