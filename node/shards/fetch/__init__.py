"""Having a shard on this machine: found here, copied, or downloaded from peers and origins.

fetcher            one job a shard for all who ask, a bounded number of downloads
job                a fetch as its callers see it: progress, result, end
download           one fetch, step by step: locate, reserve, providers, download, check, adopt, announce
folders            the folders of fetched manifests, made and removed
providers          the nodes that have the shard, and the error if none gives it
origin_feeder      takes missing pieces of a download from an origin, beside the peers
origin_selector    which origin is asked next, which is backed off
block_assignment   which blocks of pieces are this node's, by rendezvous hashing
want_announcer     tells other nodes that this one takes its blocks, and hears who else does
whole_file         a shard without a torrent, whole from an origin
"""
