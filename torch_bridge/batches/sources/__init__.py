"""Where the files of a StreamingBatchDataset come from. Each of these is a FileSource.

interface        FileSource
origin           OriginFiles: the objects of a store
hub              HubFiles: a repository of Hugging Face
swarm            SwarmFiles: the shards of a data set
archives         ArchiveFiles: files inside tar and zip archives
archive_members  archives as streams, bounded and checked
range_file       an object as a file that is read over ranges
"""
