"""The client for code without an event loop: one call at a time, over a plain socket.

with SyncClient("127.0.0.1", 7400) as client:
    status = client.call("STATUS", result_type=StatusResult)
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, Self, TypeVar, overload

import msgspec

from protocol.client import NotificationCallback, pack_request, unpack_result
from protocol.errors import MalformedMessageError, ShoalError, TimedOutError, UnreachableError, error_from_wire
from protocol.msgpackrpc import CLIENT_LIMITS, MAX_MSGID, Decoder, Message, Notification, NotRpc, Response
from protocol.sockets import notice_dead_peer

R = TypeVar("R")
_READ_BYTES = 256 * 1024
_CANCEL_S = 1.0


class SyncClient:
    """A connection to one node. Not for several threads at once."""

    def __init__(self, host: str, port: int, *, timeout_s: float = 10) -> None:
        """Connect. Raises UnreachableError if no node answers within `timeout_s`."""
        self.address = f"{host}:{port}"
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout_s)
        except (OSError, ValueError, OverflowError) as err:
            raise UnreachableError(f"cannot connect to {self.address}: {err}; does a node listen there?") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        notice_dead_peer(self._socket)
        self._decoder = Decoder(CLIENT_LIMITS)
        self._messages: deque[Message] = deque()
        self._msgids = itertools.count(1)
        self._handlers: dict[str, NotificationCallback] = {}
        self._failure: ShoalError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the node cancels what it was still doing for it."""
        self._failure = self._failure or UnreachableError(f"the connection to {self.address} was closed here")
        self._socket.close()

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed or broken."""
        return self._failure is not None

    def interrupt(self) -> None:
        """From another thread: end the connection under the call in progress, which raises UnreachableError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def on(self, method: str, callback: NotificationCallback) -> None:
        """Call back, while a call is in progress, for notifications of this method that are not the call's own."""
        self._handlers[method] = callback

    @overload
    def call(
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
    def call(
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

    def call(
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
        """As `Client.call`. A call that is interrupted (Ctrl-C, or by its callback) is cancelled on the node too."""
        if self._failure:
            raise type(self._failure)(self._failure.message, self._failure.details)
        request_id = request_id or uuid.uuid4().hex
        msgid = next(self._msgids) & MAX_MSGID
        packed = pack_request(msgid, method, params, request_id, recipient)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._send(packed, deadline)
        try:
            while True:
                match self._receive(deadline):
                    case None:
                        raise TimedOutError(f"{self.address} did not answer {method} within {timeout_s:g} s")
                    case Response(None, error, _):
                        raise self._lose(error_from_wire(error))
                    case Response(found, error, result) if found == msgid:
                        if error is not None:
                            raise error_from_wire(error)
                        break
                    case Notification(name, [dict(values), *_]):
                        callback = on_notification if values.get("request_id") == request_id else None
                        callback = callback or self._handlers.get(name)
                        if callback:
                            callback(name, values)
                    case NotRpc(_, reason):
                        error = MalformedMessageError(f"{self.address} sent what is not MessagePack-RPC: {reason}")
                        raise self._lose(error)
        except BaseException as err:
            if not isinstance(err, ShoalError) or isinstance(err, TimedOutError):
                self._cancel(request_id)
            raise
        return unpack_result(method, result, result_type)

    def _send(self, packed: bytes, deadline: float | None) -> None:
        try:
            self._set_timeout(deadline)
            self._socket.sendall(packed)
        except BaseException as err:
            # A part of the message may be on its way: nothing can be sent after it.
            failure = self._lose(UnreachableError(f"the connection to {self.address} broke while sending: {err}"))
            if isinstance(err, OSError):
                raise failure from None
            raise

    def _receive(self, deadline: float | None) -> Message | None:
        """The next message, or None when the time is over."""
        while not self._messages:
            try:
                self._set_timeout(deadline)
                data = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                return None
            except OSError as err:
                raise self._lose(UnreachableError(f"the connection to {self.address} broke: {err}")) from None
            if not data:
                raise self._lose(UnreachableError(f"{self.address} closed the connection"))
            try:
                self._messages.extend(self._decoder.feed(data))
            except ShoalError as err:
                raise self._lose(err) from None
        return self._messages.popleft()

    def _set_timeout(self, deadline: float | None) -> None:
        """Set the socket's timeout to the time that is left; raises TimeoutError if none is."""
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_s)

    def _cancel(self, request_id: str) -> None:
        """Send CANCEL; the answer belongs to no call and is dropped. Does nothing if the call is over."""
        if self._failure:
            return
        with contextlib.suppress(ShoalError):
            packed = pack_request(next(self._msgids) & MAX_MSGID, "CANCEL", {"request_id": request_id}, None, None)
            self._send(packed, time.monotonic() + _CANCEL_S)

    def _lose(self, failure: ShoalError) -> ShoalError:
        self._failure = self._failure or failure
        self._socket.close()
        return failure
