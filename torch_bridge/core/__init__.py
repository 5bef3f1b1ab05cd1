"""How a training script reaches an origin: one store, called from blocking code, from many processes, and retried.

client       O3Client: session, credentials, buckets
store        Store and AsyncStore: the objects under one URL, in blocking and in async calls
location     where a store is: its URL, opened in each process at its first call there
retry        RetryPolicy: what is tried again, how long is waited
loop_thread  the event loop in a thread that blocking calls run on; which threads may wait
closing      ClosingStack: what an iteration holds, released wherever it ends
sizes        byte_count: what "10gb" means
folders      whose a folder is, and what to do if it cannot be written
workers      a DataLoader's worker ends with its training process
ranks        Ranks: which training process this is
"""
