"""STAND-IN, for tests only, of the public classes of the akavesdk (github.com/akave-ai/akavesdk-py).

Written from what the real one was seen to do, not from its code; it talks to nobody. `akave_network` is the network
behind it, which tests look at and disturb. What it does like the real one: range arguments are chunk indices; nothing
is checked on download; transactions of one account that overlap fail with "nonce too low"; a reader that fails in the
middle of a chunk ends the chunk; `encryption_key` breaks uploads; the connection pool costs 200 ms a download;
`view_bucket` and `file_info` give None; below 127 bytes is refused; names are written once; `list_files` gives 1000 at
most; contracts are asked of a fixed node; `sdk` and `private` cannot be imported before `akavesdk`; one class of
exceptions, with what happened below it as its context alone.

Assumed, not seen: a name whose upload was not finished is there with no bytes; deleting a file frees its name.
"""

import sys

sys.modules.setdefault("akavesdk", sys.modules[__name__])

from sdk.sdk import SDK, SDKConfig, SDKError  # noqa: E402
from sdk.sdk_ipc import IPC  # noqa: E402

__all__ = ["IPC", "SDK", "SDKConfig", "SDKError"]
