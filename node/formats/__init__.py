"""File formats: headers and footers of untrusted files, and how a model is cut.

cursor           a bounded forward reader
ggml_types       bytes of a tensor by element type
gguf_file        the contents of a GGUF's header, as frozen values
gguf             the header of a GGUF, read as hostile input
gguf_writer      a GGUF written as a stream, the same bytes every time
parquet          the footer of a parquet file, checked before pyarrow sees it
kinds            the kind of a file, and the check for that kind
architectures    the layers before which each architecture may be cut
hyperparameters  a model's numbers in its header; those on which llama.cpp aborts are refused
cuts             which layers go into which shard
slices           what a slice of a model must hold for llama.cpp to load it
target           the folder that a cut goes into, locked and replaced as a whole
split            cut a GGUF into shards, with a manifest
"""
