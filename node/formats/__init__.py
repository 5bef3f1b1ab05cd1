"""File formats: what a file that someone may have tampered with says of itself, and how a model is cut.

cursor           a bounded forward reader
ggml_types       bytes of a tensor by element type
gguf_file        what a GGUF's header says, as frozen values
gguf             the header of a GGUF, read as hostile input
gguf_writer      a GGUF written as a stream, the same bytes every time
parquet          the footer of a parquet file, checked before pyarrow sees it
kinds            which kind a file is, and the check for that kind
architectures    where each model architecture may be cut, and why not elsewhere
hyperparameters  a model's numbers in its header; those on which llama.cpp aborts are refused
cuts             which layers go into which shard
slices           what a slice of a model must hold for llama.cpp to load it
split            cut a GGUF into shards, with a manifest
"""
