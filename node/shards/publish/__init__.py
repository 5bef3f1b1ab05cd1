"""Making files known under a name: their manifest, their place in the shards folder, their copies at an origin.

manifest_builder   the manifest of files, or of a folder that has one; hashes what is not hashed
placement          links or copies the files into the shards folder
publisher          the two above for a running daemon, until the files are seeded and announced
uploader           shards, torrent files and the manifest to an origin
"""
