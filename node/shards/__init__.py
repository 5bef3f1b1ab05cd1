"""What a shard is on this node: found, hashed, checked, seeded, announced, fetched, evicted.

shards       `Shards`: what the floors above call
settings     where shards lie, and how patient the room is
catalog      the state of every file; the only place where it is written
scan         what lies in the folder, and what each file is
holding      a manifest that is held here; manifest.json
survey       brings the catalog in line with the folder
watch        notices that the folder changed
admission    from a file on disk to a seed, or to `invalid`
index        what was hashed before
hasher       the process that hashes, seen from here
hash_worker  the same, seen from inside
seeds        which files the swarm seeds from
announcer    tells discovery what is here
names        what a name or a selector means
pinning      manifests that are held because someone said so
fetching     a fetch as those who wait for it see it
loader       has a shard here: it is already, or a copy is, or it is brought
intake       brings one from outside: from peers, origins, or both
sources      which peers have it, and what is said where nobody gives it
transfer     one download accompanied to its end
need         whether peers give enough
feeder       the origin's part of a download
lease        which part of it is this node's, where several want it
wanting      tells the others that it is wanted, and hears who else wants it
supply       the origins of a shard: which is asked next
whole        a shard without a torrent comes whole
space        bytes promised to downloads
folders      folders and files that a fetch makes and takes away
custody      what becomes of a shard that is here: verified, found wrong, evicted
remember     learns the piece layers of fetched files
ports        what is asked of the rooms below
"""
