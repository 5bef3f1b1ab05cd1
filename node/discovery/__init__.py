"""Discovery by a Kademlia DHT: which node has which shard, what names stand for, which nodes there are.

The only package that imports kademlia.

discovery         Discovery: announce, find, withdraw
values            settings, and the frozen values that lookups return
record_publisher  this node's own records: sealed, pushed, refreshed, handed to new neighbours, withdrawn
membership        join the DHT, prove contacts, drop dead ones, join again
overlay           look up and store at the nodes that are closest to a key
crawl             one walk towards a key that merges what every holder answers
dht_protocol      kademlia's protocol over datagrams and its routing table, with hostile input in mind
storage           records kept for others: checked, bounded, answered by fair samples
wire              datagrams to requests and answers, and back
"""

from node.discovery.discovery import Discovery
from node.discovery.values import DhtStats, DiscoverySettings, FoundNode, NameInfo, ProviderInfo, WantInfo

__all__ = ["DhtStats", "Discovery", "DiscoverySettings", "FoundNode", "NameInfo", "ProviderInfo", "WantInfo"]
