"""akave://, and o3:// through the akavesdk: Akave's nodes without a gateway.

store    the object store
sdk      the akavesdk as it really behaves; its calls block
chunks   downloaded chunks of 32,000,000 bytes, kept in temporary files
upload   the file object that the SDK reads an upload from
cid      the root CID of a file, computed from its bytes
errors   the SDK's exceptions, as the errors of origins
"""
