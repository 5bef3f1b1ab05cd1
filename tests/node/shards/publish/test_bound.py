"""PUBLISH that nobody waits for is bounded, like every other request that goes on in the background."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from node.background import Background
from node.handlers.publishing import PathRules, PublishHandlers
from node.handlers.shards import MAX_BACKGROUND
from protocol.commands.publishing import PublishParams
from protocol.errors import BusyError
from protocol.signing import SigningKey


async def test_what_goes_on_in_the_background_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"x")
    async with Background.open() as background:
        for number in range(MAX_BACKGROUND):
            background.start(asyncio.sleep(60), name=str(number), request_id=str(number))
        await asyncio.sleep(0)  # they have begun
        rules = PathRules(tmp_path / "data", tmp_path / "shards", loopback=True)
        nothing = cast(Any, None)
        handlers = PublishHandlers(nothing, SigningKey.generate(), rules, (), nothing, background, asyncio.Semaphore(1))
        with pytest.raises(BusyError, match="background"):
            await handlers.publish(PublishParams(path=str(file), wait=False), nothing)
        assert background.requests == MAX_BACKGROUND
        for number in range(MAX_BACKGROUND):
            background.cancel(str(number))
