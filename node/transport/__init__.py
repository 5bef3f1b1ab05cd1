"""Tensors from one endpoint to another, over tensor_iroh.

tensor_iroh neither acknowledges, nor bounds what is in flight, nor notices a lost peer, nor says who sent a tensor.
This package adds the four.

endpoint    IrohEndpoint: opens channels, offers and pulls tensors
channels    FrameInbox and FrameOutlet, the two ends of a channel
pull        tensors by request: offered under a channel's key, pulled by who holds it
driver      the exchange under asyncio: messages and time in, sends and wake-ups out
iroh        tensor_iroh, and what it must be protected from
ticket      an iroh node ticket, checked before use
settings    times, credits, bounds
stats       counters
core/       the protocol, without I/O and with time as an argument
"""

from node.transport.channels import FrameInbox, FrameOutlet
from node.transport.core.receiver import Frame
from node.transport.endpoint import IrohEndpoint
from node.transport.pull import Pulls, TensorOffer
from node.transport.settings import TransportSettings
from node.transport.stats import Counters, TransportStats

__all__ = [
    "Counters",
    "Frame",
    "FrameInbox",
    "FrameOutlet",
    "IrohEndpoint",
    "Pulls",
    "TensorOffer",
    "TransportSettings",
    "TransportStats",
]
