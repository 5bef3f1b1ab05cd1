"""What the stores share.

credentials    secrets, read from the environment or from files, shown nowhere
errors         what an origin answered, as OriginError and its children
retry          the loop that repeats a store's requests
listing        the objects of a listing whose keys can be read, and one warning about the others
ranges         several ranges of an object in few requests
call_threads   blocking calls in threads that are not waited for at exit
fork_guard     refuses connections, and libraries that would hang, after a fork
"""
