"""Benchmarks, each started as `python -m scripts.bench.NAME` in the repository's root; `--help` says what it starts.

transport      activations between two processes, beside tensor_iroh alone
pipeline       tokens a second of a pipeline, beside llama.cpp
llama_rpc      llama.cpp's RPC backend, as a peer of that benchmark
swarm          one file to N downloaders, beside HTTP
swarm_child    the processes of that benchmark
origin         bytes that leave an origin for N nodes
object_stores  S3 clients beside each other
disk_bound     a data set larger than the disk that it may use
checkpoint     O3CheckpointManager beside torch.save
dataset        samples a second of the data sets, beside other libraries
row_groups     parquet files with row groups of any size, beside pyarrow
ranks          the data sets of several training ranks, with and without nodes
"""
