"""Discovery: which node has which shard, what names mean, and which nodes there are. The only room that knows kademlia.

discovery     `Discovery`: what the floors above call
values        settings, and the frozen values that come out
announcer     our own records: sealed, pushed, refreshed, handed to new neighbours, withdrawn
membership    being part of the DHT: join, prove who a contact is, stay, join again
overlay       look up and store at the nodes that are closest to a key
crawl         one walk towards a key that merges what every holder says
dht_protocol  kademlia's protocol over datagrams, with hostile input in mind
routing       kademlia's routing table, bounded
storage       records kept for others, bounded, each one checked
sampling      which records of a key go into an answer of one datagram
wire          datagrams to requests and answers, and back
"""

from node.discovery.discovery import Discovery
from node.discovery.values import DhtStats, DiscoverySettings, FoundName, FoundNode, FoundProvider, FoundWant

__all__ = ["DhtStats", "Discovery", "DiscoverySettings", "FoundName", "FoundNode", "FoundProvider", "FoundWant"]
