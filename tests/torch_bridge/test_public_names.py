"""What `from torch_bridge import ...` finds."""

from __future__ import annotations

import torch_bridge


def test_each_public_name_is_where_it_is_said_to_be() -> None:
    assert {"O3StorageReader", "O3StorageWriter", "Ordering", "StreamingShardDataset"} <= set(torch_bridge._FROM)
    for name in torch_bridge._FROM:
        assert getattr(torch_bridge, name).__name__ == name
    assert set(torch_bridge._FROM) <= set(dir(torch_bridge))
