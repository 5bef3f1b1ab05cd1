"""kademlia's routing table with a bound, and with contacts that can be looked up by id."""

from __future__ import annotations

from collections.abc import Callable

from kademlia.node import Node
from kademlia.routing import RoutingTable

MAX_BUCKETS = 192
"""An honest table has about log2 of the network's size; a hostile peer could split one bucket 150 times."""


class Routing(RoutingTable):  # type: ignore[misc]
    """Contacts by distance."""

    def __init__(self, own: Node, ksize: int) -> None:
        super().__init__(None, ksize, own)
        self.crowded: Callable[[Node], None] = lambda oldest: None
        """Told when a bucket is full, with its longest unheard contact, which makes room if it answers no more."""

    def add_contact(self, node: Node) -> None:
        """Add, or move to the end of its bucket with the address it has now (Kademlia paper, section 4.2)."""
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                return
            splits = bucket.has_in_range(self.node) or bucket.depth() % 5 != 0
            if not splits or len(self.buckets) >= MAX_BUCKETS:
                self.crowded(bucket.head())
                return
            self.split_bucket(index)

    def contact(self, contact_id: bytes) -> Node | None:
        """The contact of that id, also one that only waits for a place in its bucket."""
        bucket = self.buckets[self.get_bucket_for(Node(contact_id))]
        found: Node | None = bucket.nodes.get(contact_id) or bucket.replacement_nodes.get(contact_id)
        return found

    def touch(self, contact_id: bytes) -> None:
        """A contact was heard of: its bucket's others are asked first whether they are still there."""
        bucket = self.buckets[self.get_bucket_for(Node(contact_id))]
        if contact_id in bucket.nodes:
            bucket.nodes.move_to_end(contact_id)

    def contacts(self) -> list[Node]:
        return [node for bucket in self.buckets for node in bucket.get_nodes()]

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)
