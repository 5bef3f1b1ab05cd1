"""One peer's connection: reads requests, runs them side by side, answers as they finish."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from node.clock import Clock
from node.rpc.requests import RequestRegistry
from node.rpc.settings import RpcSettings
from protocol.commands.common import Envelope, decode_params, text_keys
from protocol.errors import (
    BusyError,
    CancelledRequestError,
    InternalError,
    InvalidParamsError,
    MalformedMessageError,
    MessageTooLargeError,
    ShoalError,
    UnknownCommandError,
    WrongNodeError,
)
from protocol.ids import NodeId
from protocol.msgpackrpc import CLIENT_LIMITS, Decoder, Message, Notification, NotRpc, Request, Response, encode
from protocol.sockets import notice_dead_peer

_READ_BYTES = 64 * 1024
_MAX_NOT_RPC = 100
"""How many whole messages may be something else than MessagePack-RPC; a row of empty arrays has one a byte."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One request in progress."""

    method: str
    request_id: str
    """The client's id, or one that the server made; CANCEL names it."""
    sender: str | None
    """The name that the client gives itself (`from`); it is not checked."""
    connection: Connection

    def notify(self, method: str, params: msgspec.Struct | Mapping[str, Any]) -> None:
        """Send a notification to the client. Its params must carry the request id, to reach the call."""
        self.connection.notify(method, params)


Handler = Callable[[Any, Call], Awaitable[msgspec.Struct | Mapping[str, Any] | None]]
"""Takes the decoded parameters. Its task is cancelled by CANCEL, and when the connection is lost."""


@dataclass(frozen=True)
class Command:
    """The parameters and the handler of one command."""

    params: type[msgspec.Struct] | None
    """None: the handler gets the map undecoded, a `dict[str, Any]`."""
    handler: Handler


@dataclass(frozen=True)
class RpcContext:
    """What the connections of one server share."""

    commands: Mapping[str, Command]
    node_id: NodeId
    settings: RpcSettings
    requests: RequestRegistry
    clock: Clock


class Connection:
    """A peer's connection, from accept to close."""

    def __init__(self, context: RpcContext, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.closed = asyncio.Event()
        """Set when the connection is lost or closed."""
        peer = writer.get_extra_info("peername") or ("?", 0)
        self.peer = f"{peer[0]}:{peer[1]}"
        self._context = context
        self._requests = context.requests
        self._settings = context.settings
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder(context.settings.limits)
        self._incoming_bytes = 0
        self._not_rpc = 0
        self._calls: dict[asyncio.Task[None], Call] = {}
        self._sending = asyncio.Lock()
        self._keys = itertools.count()
        self._on_close: dict[int, Callable[[], None]] = {}

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once when the connection is closed; at once if it already is.

        Returns a function that removes the callback: a connection may outlive many that wait for its end.
        """
        if self.closed.is_set():
            callback()
            return lambda: None
        key = next(self._keys)
        self._on_close[key] = callback
        return lambda: self._forget(key)

    def notify(self, method: str, params: msgspec.Struct | Mapping[str, Any]) -> None:
        """Send a notification, in order and without waiting; nothing happens on a closed connection.

        A peer that leaves more than `max_unsent_bytes` unread loses its connection: a missing token would be worse.
        """
        if self.closed.is_set():
            return
        self._writer.write(encode(Notification(method, [params])))
        if self._writer.transport.get_write_buffer_size() > self._settings.max_unsent_bytes:
            _log.warning("%s does not read its notifications: closing its connection", self.peer)
            self._close()

    def _forget(self, key: int) -> None:
        self._on_close.pop(key, None)

    async def turn_away(self, error: ShoalError) -> None:
        """Serve nothing; answer with the error and close."""
        try:
            await self._refuse(error)
        finally:
            self._close()

    async def run(self) -> None:
        """Serve the peer until it, or the server, closes the connection."""
        notice_dead_peer(self._writer.get_extra_info("socket"))
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    await self._read(group)
                finally:
                    self._end()
        finally:
            self._close()

    def cancel_all(self) -> list[asyncio.Task[None]]:
        """Cancel every request, each to be answered with `cancelled`: the node shuts down."""
        for task in self._calls:
            self._requests.cancel_task(task)
        return list(self._calls)

    def _count_incoming(self, buffered_bytes: int) -> None:
        """Count the bytes of the next message so far. Raises BusyError if all connections together hold too many."""
        self._requests.count_incoming(buffered_bytes - self._incoming_bytes)
        self._incoming_bytes = buffered_bytes

    def _close(self) -> None:
        self._end()
        self._writer.transport.abort()

    def _end(self) -> None:
        """Send nothing more; cancel the requests in progress."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._count_incoming(0)
        for task in self._calls:
            task.cancel()
        for callback in list(self._on_close.values()):
            try:
                callback()
            except Exception:
                _log.exception("a callback for the closed connection of %s failed", self.peer)

    async def _read(self, group: asyncio.TaskGroup) -> None:
        try:
            while data := await self._next_bytes():
                for message in self._decoder.feed(data):
                    self._count_incoming(min(self._incoming_bytes, self._decoder.buffered_bytes))
                    await self._take(message, group)
                self._count_incoming(self._decoder.buffered_bytes)
        except (MalformedMessageError, MessageTooLargeError, BusyError) as err:
            await self._refuse(err)
        except OSError as err:
            _log.debug("the connection of %s broke: %s", self.peer, err)

    async def _next_bytes(self) -> bytes:
        """Bytes from the peer; empty at the end. A peer may be silent for long between messages, but not within one."""
        if not self._decoder.buffered_bytes:
            return await self._reader.read(_READ_BYTES)
        try:
            async with self._context.clock.timeout(self._settings.stall_s):
                return await self._reader.read(_READ_BYTES)
        except TimeoutError:
            raise MalformedMessageError(f"a message was not finished within {self._settings.stall_s:g} s") from None

    async def _refuse(self, error: ShoalError) -> None:
        """Send the error, then close after the peer has had time to read it."""
        _log.info("closing the connection of %s: %s", self.peer, error.message)
        msgid = self._decoder.msgid
        self._decoder.drop()  # what was received is not counted any more, so it may not stay either
        with contextlib.suppress(OSError):
            async with self._context.clock.timeout(self._settings.linger_s):
                await self._send(Response(msgid, error.to_wire(), None))
                self._end()
                self._writer.write_eof()
                while await self._reader.read(_READ_BYTES):
                    pass

    async def _take(self, message: Message, group: asyncio.TaskGroup) -> None:
        match message:
            case Request():
                try:
                    self._start(message, group)
                except ShoalError as err:
                    await self._send(Response(message.msgid, err.to_wire(), None))
            case NotRpc(msgid, reason):
                self._not_rpc += 1
                if self._not_rpc > _MAX_NOT_RPC:
                    raise MalformedMessageError(f"{self._not_rpc} messages were not MessagePack-RPC: {reason}")
                await self._send(Response(msgid, MalformedMessageError(reason).to_wire(), None))
            case Notification(method, _):
                _log.debug("%s sent the notification %.100r, which is ignored", self.peer, method)
            case Response():
                _log.debug("%s sent an answer, but was asked nothing", self.peer)

    def _start(self, request: Request, group: asyncio.TaskGroup) -> None:
        """Begin a request in a task of its own. Raises the error to answer instead."""
        # CANCEL is how a client makes room, so there is room for it.
        bound = self._settings.max_in_flight * (2 if request.method == "CANCEL" else 1)
        if len(self._calls) >= bound:
            raise BusyError(f"{len(self._calls)} requests are in progress on this connection; wait for an answer")
        command = self._context.commands.get(request.method)
        if command is None:
            raise UnknownCommandError(
                f"{request.method[:100]!r} is not a command of this node; see details.commands",
                {"commands": sorted(self._context.commands)},
            )
        if len(request.params) > 2:
            raise InvalidParamsError(f"params are [map of parameters, envelope], not {len(request.params)} values")
        raw_params, raw_envelope = [*request.params, None, None][:2]
        envelope = decode_params(Envelope, {} if raw_envelope is None else raw_envelope)
        if envelope.recipient not in (None, self._context.node_id):
            raise WrongNodeError(
                f"the request is for node {envelope.recipient[:100]}, this is {self._context.node_id}",
                {"node_id": self._context.node_id},
            )
        raw_params = {} if raw_params is None else raw_params
        params = text_keys(raw_params) if command.params is None else decode_params(command.params, raw_params)
        call = Call(request.method, envelope.request_id or uuid.uuid4().hex, envelope.sender, self)
        self._requests.check_room(request.cost_bytes)
        task = group.create_task(self._run(request.msgid, command, params, call))
        self._calls[task] = call
        self._requests.add(task, call.request_id, request.cost_bytes)
        task.add_done_callback(self._calls.pop)

    async def _run(self, msgid: int, command: Command, params: msgspec.Struct | dict[str, Any], call: Call) -> None:
        error: ShoalError
        try:
            result = await command.handler(params, call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self._requests.was_cancelled(task):
                raise
            task.uncancel()
            error = CancelledRequestError(f"{call.method} was cancelled", {"request_id": call.request_id})
        except ShoalError as err:
            error = err
        except Exception:
            _log.exception("%s failed, request id %s of %s", call.method, call.request_id, self.peer)
            error = InternalError(
                f"{call.method} failed inside the node; its log tells why, under this request id",
                {"request_id": call.request_id},
            )
        else:
            await self._send(Response(msgid, None, result))
            return
        await self._send(Response(msgid, error.to_wire(), None))

    async def _send(self, response: Response) -> None:
        """Send one answer and wait until the peer has read it, except for what the sockets buffer."""
        async with self._sending:
            if self.closed.is_set():
                return
            self._writer.write(_pack(response))
            unsent = self._writer.transport.get_write_buffer_size()
            while True:
                try:
                    async with self._context.clock.timeout(self._settings.stall_s):
                        await self._writer.drain()
                        return
                except TimeoutError:
                    before, unsent = unsent, self._writer.transport.get_write_buffer_size()
                    if unsent >= before:
                        _log.warning("%s does not read its answers: closing its connection", self.peer)
                        self._close()
                        return
                except OSError:
                    return  # the reader notices too, and ends the connection


def _pack(response: Response) -> bytes:
    try:
        packed = encode(response)
    except (TypeError, ValueError, OverflowError):
        _log.exception("an answer has no MessagePack form")
        error = response.error or InternalError("the node's answer could not be packed; its log tells why").to_wire()
        return encode(Response(response.msgid, {**error, "details": {}}, None))
    if len(packed) <= CLIENT_LIMITS.max_message_bytes:
        return packed
    too_large = MessageTooLargeError(
        f"the answer takes {len(packed)} bytes, clients take {CLIENT_LIMITS.max_message_bytes}; ask for less"
    )
    return encode(Response(response.msgid, too_large.to_wire(), None))
