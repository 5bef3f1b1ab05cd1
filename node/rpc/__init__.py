"""The MessagePack-RPC server, through which every command comes.

settings    how much a peer may ask of it
requests    the requests in progress of all connections: by id, with the memory that they hold
connection  one peer: reads requests, runs them side by side, answers as they finish
server      listens, accepts connections, and ends them in order
"""

from node.rpc.connection import Call, Command, Connection, Handler
from node.rpc.server import RpcServer
from node.rpc.settings import RpcSettings

__all__ = ["Call", "Command", "Connection", "Handler", "RpcServer", "RpcSettings"]
