"""One peer: reads requests, runs them side by side, answers as they finish."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from node.rpc.call import Call, Command
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
from protocol.msgpackrpc import CLIENT_LIMITS, Decoder, Message, Notification, NotRpc, Request, Response, encode
from protocol.sockets import notice_dead_peer

if TYPE_CHECKING:
    from node.rpc.server import RpcServer

_READ_BYTES = 64 * 1024
_MAX_NONSENSE = 100
"""Messages that are whole but no MessagePack-RPC; each byte of an endless row of empty arrays is one."""
_log = logging.getLogger(__name__)


class Connection:
    """A peer's connection, from accept to close."""

    def __init__(self, server: RpcServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.closed = asyncio.Event()
        """Set when the connection is lost or closed."""
        peer = writer.get_extra_info("peername") or ("?", 0)
        self.peer = f"{peer[0]}:{peer[1]}"
        self._server = server
        self._settings = server.settings
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder(server.settings.limits)
        self._incoming_bytes = 0
        self._nonsense = 0
        self._requests: dict[asyncio.Task[None], Call] = {}
        self._sending = asyncio.Lock()
        self._keys = itertools.count()
        self._on_close: dict[int, Callable[[], None]] = {}

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once when the connection is closed; at once where it already is.

        Returns what forgets the callback again: a connection may outlive many that wait for its end.
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
        """Serve nothing, and say why."""
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
        for task in self._requests:
            self._server.cancel_task(task)
        return list(self._requests)

    def _count_incoming(self, buffered_bytes: int) -> None:
        """Count what has come of the next message. Raises BusyError where all connections together hold too much."""
        self._server.receive(buffered_bytes - self._incoming_bytes)
        self._incoming_bytes = buffered_bytes

    def _close(self) -> None:
        self._end()
        self._writer.transport.abort()

    def _end(self) -> None:
        """Nothing more is sent; what was asked for is cancelled."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._count_incoming(0)
        for task in self._requests:
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
        """Empty at the end. A peer may be silent for long between messages, but not within one."""
        if not self._decoder.buffered_bytes:
            return await self._reader.read(_READ_BYTES)
        try:
            async with asyncio.timeout(self._settings.stall_s):
                return await self._reader.read(_READ_BYTES)
        except TimeoutError:
            raise MalformedMessageError(f"a message was not finished within {self._settings.stall_s:g} s") from None

    async def _refuse(self, error: ShoalError) -> None:
        """Say why, then close once the peer has had time to read it."""
        _log.info("closing the connection of %s: %s", self.peer, error.message)
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self._settings.linger_s):
                await self._send(Response(self._decoder.msgid, error.to_wire(), None))
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
                self._nonsense += 1
                if self._nonsense > _MAX_NONSENSE:
                    raise MalformedMessageError(f"{self._nonsense} messages were not MessagePack-RPC: {reason}")
                await self._send(Response(msgid, MalformedMessageError(reason).to_wire(), None))
            case Notification(method, _):
                _log.debug("%s sent the notification %.100r, which no one waits for", self.peer, method)
            case Response():
                _log.debug("%s sent an answer, but was asked nothing", self.peer)

    def _start(self, request: Request, group: asyncio.TaskGroup) -> None:
        """Begin a request in a task of its own. Raises what must be answered instead."""
        # CANCEL is how a client makes room, so there is room for it.
        bound = self._settings.max_in_flight * (2 if request.method == "CANCEL" else 1)
        if len(self._requests) >= bound:
            raise BusyError(f"{len(self._requests)} requests are in progress on this connection; wait for an answer")
        command = self._server.commands.get(request.method)
        if command is None:
            raise UnknownCommandError(
                f"{request.method[:100]!r} is no command of this node; see details.commands",
                {"commands": sorted(self._server.commands)},
            )
        if len(request.params) > 2:
            raise InvalidParamsError(f"params are [map of parameters, envelope], not {len(request.params)} values")
        raw_params, raw_envelope = [*request.params, None, None][:2]
        envelope = decode_params(Envelope, {} if raw_envelope is None else raw_envelope)
        if envelope.recipient not in (None, self._server.node_id):
            raise WrongNodeError(
                f"the request is for node {envelope.recipient[:100]}, this is {self._server.node_id}",
                {"node_id": self._server.node_id},
            )
        raw_params = {} if raw_params is None else raw_params
        params = text_keys(raw_params) if command.params is None else decode_params(command.params, raw_params)
        call = Call(request.method, envelope.request_id or uuid.uuid4().hex, envelope.sender, self)
        self._server.check_room(request.cost_bytes)
        task = group.create_task(self._run(request.msgid, command, params, call))
        self._requests[task] = call
        self._server.add(task, call.request_id, request.cost_bytes)
        task.add_done_callback(self._requests.pop)

    async def _run(self, msgid: int, command: Command, params: msgspec.Struct | dict[str, Any], call: Call) -> None:
        error: ShoalError
        try:
            result = await command.handler(params, call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self._server.was_cancelled(task):
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
        """Send one answer and wait until the peer has taken it, but for what the socket's buffers hold."""
        async with self._sending:
            if self.closed.is_set():
                return
            self._writer.write(_pack(response))
            unsent = self._writer.transport.get_write_buffer_size()
            while True:
                try:
                    async with asyncio.timeout(self._settings.stall_s):
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
