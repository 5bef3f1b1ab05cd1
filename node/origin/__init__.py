"""Where shards come from when no peer has them. The only room that knows object stores.

What the node sees:
origins            the configured origins, and those that manifests name
places             one origin as the shard loader sees it: bytes of shards
publishing         shards and torrent files up, the manifest last
checking           whether what lies there is what a manifest says
configured         from a node's settings to those of its origins
layout             names of objects, and what is read out of manifests and torrent files
buckets            made, listed and taken away, by hand or by a check
policy             which origins a stranger may name

The stores:
interface          what every store can do: bytes under names, in ranges
opening            from a URL to its store
url                origins' URLs, and the keys under them
settings           endpoints, times, credentials
credentials        secrets, from the environment or files, shown nowhere
failures           what an origin answered, as our errors
retry, ranges      what stores share: short retries, several ranges in few requests
forked             what a fork leaves behind: refuses connections that came through one
s3*, upload        s3:// and o3://, by obstore and botocore; large objects in resumable parts; s3_forked for forked
                   processes, where obstore would hang
web, hf, http_*    https:// and hf://, read alone; hf_files through huggingface_hub's own file system
files              file://
akave*             akave://, and o3:// by the SDK
encryption*        encryption above any store
"""
