"""Shards on this node: found, hashed, checked, seeded, announced, fetched, published, evicted.

service            `Shards`: what the packages above call
resolver           what a name, a digest or a selector means
eviction           deletes a shard's file
leases             which client still reads which shard
pins               which shard files stay until a person ends that
kept_manifests     manifests that are held because the operator named them
interfaces         what is asked of the packages below
settings           where shards lie, and how long what may take
store/             the files on this machine
fetch/             from peers and origins to the disk
publish/           from files to a manifest that others find
"""
