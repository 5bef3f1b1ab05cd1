"""Origins: object stores that shards come from when no peer has them. The only package that knows object stores.

What the node uses:
registry      the node's origins in their order, and those that manifests name; finds manifests by name or URL
policy        which origins a stranger may name
location      one origin as readers of shards see it: bytes of shards, their piece layers, their content ids
layout        keys of shards, torrent files and manifests; what is read out of the latter two
publishing    uploads shards and torrent files, then the manifest
buckets       buckets: create, list, delete

The stores:
interface     ObjectStore, the protocol of every back-end, and ObjectInfo
factory       from a URL to its store
url           the URLs of origins, and the keys under them
settings      endpoints, credentials, time-outs; what of the node's settings is about origins
local         file://, a folder

Packages:
core          what the stores share: credentials, errors, retry, ranges, threads, forks
s3            s3:// and o3://, through obstore and botocore
http          https://, read only
huggingface   hf://, read only
akave         akave://, and o3:// through Akave's SDK
encryption    encryption on top of any store
"""
