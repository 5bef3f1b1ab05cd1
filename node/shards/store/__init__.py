"""The shard files of this machine: found, hashed, checked, seeded, announced.

catalog       the state of every file; the only module that writes it
manifests     the manifests of folders on this machine, and the names that they give
layout        folders and files that a fetch makes, moves or deletes
listing       what lies in the shards folder, and what each file is
scanner       brings the catalog in line with the folder, and notices that it changed
verifier      from a file on disk to a seed, or to `invalid`
hash_cache    what was hashed before
hasher        the process that hashes and parses headers, seen from the daemon
hash_worker   the same, seen from inside
backfill      hashes fetched files once more, so that the cache has their piece layers
disk_space    bytes promised to downloads
seeding       which files the swarm seeds from
announcer     tells other nodes what is here
quarantine    takes a file that is known to be wrong out of circulation
"""
