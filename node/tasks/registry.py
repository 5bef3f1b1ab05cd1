"""Task types: the built-in ones and those that an installed package adds by an entry point.

A package extends EXECUTE_TASK by an entry point of the group `shoal.tasks` that names a `TaskType`:

    [project.entry-points."shoal.tasks"]
    count_words = "my_package:COUNT_WORDS"
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from node.discovery import Discovery
from node.pipeline.stage.stages import Stages
from node.rpc import Call, Handler
from node.shards.service import Shards
from protocol.commands.common import decode_params
from protocol.errors import InvalidParamsError
from protocol.ids import NodeId

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "shoal.tasks"
OWN_DISTRIBUTION = "shoal"


@dataclass(frozen=True)
class TaskContext:
    """What a task may use of the node that runs it."""

    node_id: NodeId
    rpc_address: tuple[str, int]
    """Where this node's own RPC listens: a coordinator treats itself as any other node."""
    shards: Shards
    stages: Stages
    discovery: Discovery
    ctx_size: int
    """Tokens that one session may have here."""


@dataclass(frozen=True)
class TaskType:
    """One kind of task."""

    name: str
    params: type[msgspec.Struct]
    """EXECUTE_TASK's parameters without `task_type` are decoded to this."""
    run: Callable[[TaskContext, Any, Call], Awaitable[msgspec.Struct | Mapping[str, Any]]]
    """Raises ShoalError; cancelled when the request is."""


class TaskRegistry:
    """Task types by name."""

    def __init__(self, types: Iterable[TaskType]) -> None:
        """Of two types with one name the first counts, and the other is logged."""
        self._types: dict[str, TaskType] = {}
        for one in types:
            if self._types.setdefault(one.name, one) is not one:
                log.error("a second task type %s is left out: %r", one.name, one.run)

    @classmethod
    def from_entry_points(cls) -> TaskRegistry:
        """All that are installed, our own first. One that cannot be imported is logged and left out."""
        found: list[TaskType] = []
        entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        for entry in sorted(entries, key=lambda entry: entry.dist is None or entry.dist.name != OWN_DISTRIBUTION):
            try:
                task_type = entry.load()
            except Exception:
                log.exception("task type %s (%s) cannot be loaded", entry.name, entry.value)
                continue
            if isinstance(task_type, TaskType):
                found.append(task_type)
            else:
                log.error("task type %s (%s) is a %s, not a TaskType", entry.name, entry.value, type(task_type))
        return cls(found)

    def names(self) -> list[str]:
        return sorted(self._types)

    def handler(self, context: TaskContext) -> Handler:
        """EXECUTE_TASK of one node."""

        async def execute_task(parameters: Mapping[str, Any], call: Call) -> msgspec.Struct | Mapping[str, Any]:
            return await self.execute(context, parameters, call)

        return execute_task

    async def execute(
        self, context: TaskContext, parameters: Mapping[str, Any], call: Call
    ) -> msgspec.Struct | Mapping[str, Any]:
        """Run one task. Raises InvalidParamsError for an unknown type and for parameters it does not take."""
        rest = dict(parameters)
        name = rest.pop("task_type", None)
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        task_type = self._types.get(name) if isinstance(name, str) else None
        if task_type is None:
            raise InvalidParamsError(
                f"task_type is {name!r}; this node runs: {', '.join(self.names())}", {"task_types": self.names()}
            )
        return await task_type.run(context, decode_params(task_type.params, rest), call)
