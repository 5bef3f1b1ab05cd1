"""Tensors from one endpoint to another, over tensor_iroh.

tensor_iroh neither acknowledges, nor bounds what is in flight, nor notices a lost peer, nor says who sent a tensor.
This room adds the four. From `exchange` down there is no I/O, and time is an argument.

interface   what the rest of the node may know of a transport
endpoint    IrohEndpoint: opens channels, pulls tensors; a thin shell over what follows
channels    Inbox and Outlet, the two ends of a channel
iroh        one tensor_iroh node, and what it must be protected from
exchange    all channels without I/O: routing, keys, time
table       which channels are open, how they end
post        what leaves together for one peer
sender      the outlet's half: credits, resending, a lost peer
receiver    the inbox's half: order, whole tensors, answers
graves      channels that were closed, to tell late frames
links       the values these work with
wire        the header of a message, as bytes and back
ticket      an iroh node ticket, checked before use
settings    times, credits, bounds
stats       counters
"""

from node.transport.channels import Inbox, Outlet
from node.transport.core.receiver import Frame
from node.transport.endpoint import IrohEndpoint
from node.transport.interface import Endpoint, FrameInbox, FrameOutlet
from node.transport.settings import TransportSettings
from node.transport.stats import Counters, TransportStats

__all__ = [
    "Counters",
    "Endpoint",
    "Frame",
    "FrameInbox",
    "FrameOutlet",
    "Inbox",
    "IrohEndpoint",
    "Outlet",
    "TransportSettings",
    "TransportStats",
]
