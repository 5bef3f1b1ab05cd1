"""The asyncio client of a node.

    async with Client.connect("127.0.0.1", 7400) as client:
        status = await client.call("STATUS", result_type=StatusResult)

Any number of calls may be in flight at once, from any task of the loop that connected. A call that is cancelled,
or that runs out of time, is cancelled on the node too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar, overload

import msgspec

from protocol.commands.common import Envelope
from protocol.errors import (
    InvalidParamsError,
    MalformedMessageError,
    MessageTooLargeError,
    ShoalError,
    TimedOutError,
    UnreachableError,
    error_from_wire,
)
from protocol.msgpackrpc import (
    CLIENT_LIMITS,
    MAX_MSGID,
    SERVER_LIMITS,
    Decoder,
    Message,
    Notification,
    NotRpc,
    Request,
    Response,
    encode,
)
from protocol.sockets import notice_dead_peer
from protocol.structs import prepared

R = TypeVar("R")
NotificationCallback = Callable[[str, dict[str, Any]], None]
"""Gets a notification's method and its map of parameters. Called from the reading task: it must not block."""

_READ_BYTES = 256 * 1024
_FLUSH_S = 1.0
_log = logging.getLogger(__name__)


class Client:
    """A connection to one node; made by `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self.address = address
        """`host:port`, for messages."""
        self.closed = asyncio.Event()
        """Set when the connection is lost or closed; every call then fails."""
        self._reader = reader
        self._writer = writer
        self._msgids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._callbacks: dict[str, NotificationCallback] = {}
        self._handlers: dict[str, NotificationCallback] = {}
        self._failure: ShoalError | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, host: str, port: int, *, timeout_s: float = 10) -> AsyncIterator[Client]:
        """Connect to a node. Raises UnreachableError if none answers within `timeout_s`."""
        address = f"{host}:{port}"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, port, limit=_READ_BYTES)
        except TimeoutError:
            raise UnreachableError(f"{address} did not accept a connection within {timeout_s:g} s") from None
        except (OSError, ValueError, OverflowError) as err:
            raise UnreachableError(f"cannot connect to {address}: {err}; does a node listen there?") from None
        notice_dead_peer(writer.get_extra_info("socket"))
        client = cls(reader, writer, address)
        reading = asyncio.create_task(client._read(), name=f"read {address}")  # noqa: TID251 - awaited at the end of the block
        try:
            yield client
        finally:
            client._lose(UnreachableError(f"the connection to {address} was closed here"))
            reading.cancel()
            with contextlib.suppress(OSError):  # TimeoutError, if the peer does not read what is still unsent
                async with asyncio.timeout(_FLUSH_S):
                    await writer.wait_closed()
            writer.transport.abort()
            await asyncio.wait([reading])

    def on(self, method: str, callback: NotificationCallback) -> None:
        """Call back for notifications of this method that belong to no call in flight with a callback of its own."""
        self._handlers[method] = callback

    @overload
    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | msgspec.Struct | None = None,
        *,
        result_type: type[R],
        request_id: str | None = None,
        recipient: str | None = None,
        timeout_s: float | None = None,
        on_notification: NotificationCallback | None = None,
    ) -> R: ...

    @overload
    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | msgspec.Struct | None = None,
        *,
        result_type: None = None,
        request_id: str | None = None,
        recipient: str | None = None,
        timeout_s: float | None = None,
        on_notification: NotificationCallback | None = None,
    ) -> Any: ...

    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | msgspec.Struct | None = None,
        *,
        result_type: type[Any] | None = None,
        request_id: str | None = None,
        recipient: str | None = None,
        timeout_s: float | None = None,
        on_notification: NotificationCallback | None = None,
    ) -> Any:
        """Send the node one command and wait for its answer.

        `request_id` is generated if missing; notifications that carry it go to `on_notification`. With
        `recipient`, a node id, another node refuses. `timeout_s` None waits for as long as the connection lives.
        Returns a `result_type`, or plain MessagePack values without one.

        Raises the error that the node answered, UnreachableError when the connection is or gets lost,
        TimedOutError, InvalidParamsError or MessageTooLargeError for what cannot be sent, and
        MalformedMessageError for an answer that is not a `result_type`.
        """
        if self._failure:
            raise _copy(self._failure)
        request_id = request_id or uuid.uuid4().hex
        msgid = self._next_msgid()
        packed = pack_request(msgid, method, params, request_id, recipient)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[msgid] = answer
        if on_notification:
            self._callbacks[request_id] = on_notification
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(packed)
                with contextlib.suppress(OSError):  # a lost connection comes by `answer`
                    await self._writer.drain()
                result = await answer
        except TimeoutError:
            self._cancel(request_id)
            raise TimedOutError(f"{self.address} did not answer {method} within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._cancel(request_id)
            raise
        finally:
            del self._calls[msgid]
            if self._callbacks.get(request_id) is on_notification:
                self._callbacks.pop(request_id, None)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # seen: a loss that came after the time was over must not be warned about
        return unpack_result(method, result, result_type)

    def _next_msgid(self) -> int:
        return next(msgid for n in self._msgids if (msgid := n & MAX_MSGID) not in self._calls)

    def _cancel(self, request_id: str) -> None:
        """Send CANCEL and do not wait: the answer belongs to no call and is dropped."""
        if not self._failure:
            self._writer.write(pack_request(self._next_msgid(), "CANCEL", {"request_id": request_id}, None, None))

    async def _read(self) -> None:
        decoder = Decoder(CLIENT_LIMITS)
        try:
            while data := await self._reader.read(_READ_BYTES):
                for message in decoder.feed(data):
                    self._take(message)
            self._lose(UnreachableError(f"{self.address} closed the connection"))
        except OSError as err:
            self._lose(UnreachableError(f"the connection to {self.address} broke: {err}"))
        except ShoalError as err:
            self._lose(err)
        finally:
            self._lose(UnreachableError(f"the connection to {self.address} is no longer read"))

    def _take(self, message: Message) -> None:
        match message:
            case Response(None, error, _):
                self._lose(error_from_wire(error))
            case Response(int(msgid), error, result):
                answer = self._calls.get(msgid)
                if answer and not answer.done():
                    if error is None:
                        answer.set_result(result)
                    else:
                        answer.set_exception(error_from_wire(error))
            case Notification(method, [dict(params), *_]):
                request_id = params.get("request_id")
                callback = self._callbacks.get(request_id) if isinstance(request_id, str) else None
                callback = callback or self._handlers.get(method)
                if callback:
                    try:
                        callback(method, params)
                    except Exception:
                        _log.exception("the callback for %s from %s failed", method, self.address)
            case Request(msgid, method, _):
                _log.debug("%s sent a request (%s, %d) to a client", self.address, method, msgid)
            case NotRpc(_, reason):
                raise MalformedMessageError(f"{self.address} sent what is not MessagePack-RPC: {reason}")

    def _lose(self, failure: ShoalError) -> None:
        """End the connection; the first reason is kept."""
        if self._failure:
            return
        self._failure = failure
        self.closed.set()
        self._writer.close()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(_copy(failure))


def _copy(failure: ShoalError) -> ShoalError:
    """Each caller raises its own, with its own traceback."""
    return type(failure)(failure.message, failure.details)


async def call_address(
    host: str,
    port: int,
    method: str,
    params: Mapping[str, Any] | msgspec.Struct | None = None,
    *,
    result_type: type[R],
    recipient: str | None = None,
    timeout_s: float = 30,
) -> R:
    """Connect, call once, close; `timeout_s` is for each of the first two."""
    async with Client.connect(host, port, timeout_s=timeout_s) as client:
        return await client.call(method, params, result_type=result_type, recipient=recipient, timeout_s=timeout_s)


def pack_request(
    msgid: int,
    method: str,
    params: Mapping[str, Any] | msgspec.Struct | None,
    request_id: str | None,
    recipient: str | None,
) -> bytes:
    """A request's bytes. Raises InvalidParamsError for values without a MessagePack form, MessageTooLargeError."""
    envelope = Envelope(request_id=request_id, recipient=recipient)
    try:
        packed = encode(Request(msgid, method, [params if params is not None else {}, envelope]))
    except (TypeError, ValueError, OverflowError) as err:
        raise InvalidParamsError(f"the parameters of {method} cannot be sent: {err}") from None
    if len(packed) > SERVER_LIMITS.max_message_bytes:
        raise MessageTooLargeError(
            f"the parameters of {method} take {len(packed)} bytes, nodes take {SERVER_LIMITS.max_message_bytes}",
            {"max_message_bytes": SERVER_LIMITS.max_message_bytes},
        )
    return packed


def unpack_result(method: str, result: object, result_type: type[R] | None) -> Any:
    """Check an answer against its declaration. Raises MalformedMessageError."""
    if result_type is None:
        return result
    try:
        return msgspec.convert(result, prepared(result_type))
    except msgspec.ValidationError as err:
        raise MalformedMessageError(f"the answer to {method} is not of type {result_type.__name__}: {err}") from None
