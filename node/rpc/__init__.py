"""The MessagePack-RPC server: the door through which every command comes.

settings    how much a peer may ask of it
call        a command's declaration, and a request in progress as its handler sees it
connection  one peer: reads requests, runs them side by side, answers as they finish
server      listens, and knows every request of the node by its id
"""

from node.rpc.call import Call, Command, Handler
from node.rpc.connection import Connection
from node.rpc.server import RpcServer
from node.rpc.settings import RpcSettings

__all__ = ["Call", "Command", "Connection", "Handler", "RpcServer", "RpcSettings"]
