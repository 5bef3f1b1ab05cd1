"""STAND-IN: see akavesdk/__init__.py."""
# ruff: noqa: B904 - the real one raises without `from`, too

import time
from dataclasses import dataclass

from akave_network import CHUNK, File

from tests.support.origins.root_cid import root_cid_of


class SDKError(Exception):
    pass


@dataclass
class IPCBucket:
    id: str
    name: str
    created_at: int


@dataclass
class IPCFileMeta:
    root_cid: str
    name: str
    bucket_name: str
    encoded_size: int
    actual_size: int
    is_public: bool
    created_at: int


@dataclass
class IPCFileListItem:
    root_cid: str
    name: str
    encoded_size: int
    actual_size: int
    created_at: int


@dataclass
class IPCFileMetaV2:
    root_cid: str
    bucket_name: str
    name: str
    encoded_size: int
    size: int


@dataclass
class Chunk:
    cid: str
    encoded_size: int
    size: int
    index: int


@dataclass
class IPCFileDownload:
    bucket_name: str
    name: str
    chunks: list


class IPC:
    def __init__(self, node, config, sdk):
        self._node, self._config, self._sdk = node, config, sdk

    def create_bucket(self, ctx, name):
        try:
            self._call("create_bucket")
            self._node.transaction()
        except Exception as e:
            raise SDKError(f"bucket creation failed: {e}")
        self._node.buckets.setdefault(name, {})
        return IPCBucket("b1", name, 1_700_000_000)

    def view_bucket(self, ctx, bucket_name):
        try:
            self._call("view_bucket")
        except Exception as e:
            raise SDKError(f"failed to view bucket: {e}")
        return IPCBucket("b1", bucket_name, 1_700_000_000) if bucket_name in self._node.buckets else None

    def list_buckets(self, ctx, offset=0, limit=0):
        return [IPCBucket("b1", name, 1_700_000_000) for name in self._node.buckets]

    def file_info(self, ctx, bucket_name, file_name):
        try:
            self._call("file_info")
        except Exception as e:
            raise SDKError(f"failed to get file info: {e}")
        file = self._node.buckets.get(bucket_name, {}).get(file_name)
        if file is None:
            return None
        return IPCFileMeta(file.root_cid, file_name, bucket_name, file.size, file.size, False, file.created_at)

    def list_files(self, ctx, bucket_name):
        try:
            self._call("list_files")
        except Exception as e:
            raise SDKError(f"failed to list files: {e}")
        if bucket_name not in self._node.buckets:
            raise SDKError("failed to list files: bucket not found")
        files = self._node.buckets[bucket_name].items()
        return [IPCFileListItem(file.root_cid, name, file.size, file.size, file.created_at) for name, file in files][
            :1000
        ]

    def file_delete(self, ctx, bucket_name, file_name):
        try:
            self._call("file_delete")
            if self._node.refuse_deletes:
                raise ValueError("transaction reverted")
            self._node.transaction()
            del self._node.buckets[bucket_name][file_name]
        except Exception as e:
            raise SDKError(f"failed to delete file: {e}")

    def upload(self, ctx, bucket_name, file_name, reader):
        try:
            return self._upload(bucket_name, file_name, reader)
        except Exception as e:
            raise SDKError(f"upload failed: {e}")

    def _upload(self, bucket_name, file_name, reader):
        self._call("upload")
        if self._config.encryption_key:
            raise SDKError("bucket not found")  # it looks for the bucket under an encrypted name
        if bucket_name not in self._node.buckets:
            raise SDKError(f"failed to create file upload: bucket '{bucket_name}' not found")
        if file_name in self._node.buckets[bucket_name]:
            raise SDKError("failed to create file upload: file already exists")
        self._node.transaction()
        file = self._node.buckets[bucket_name][file_name] = File([])
        while chunk := self._read_chunk(reader):
            self._call("upload_chunk")
            if self._node.fail_chunk == len(file.chunks):
                raise SDKError("failed to upload block: streaming upload failed: connection reset")
            file.chunks.append(chunk)
            self._node.transaction()
        size = sum(len(chunk) for chunk in file.chunks)
        if size < 127:
            raise SDKError("execution reverted: FileSize")
        file.root_cid = root_cid_of(file.chunks)
        return IPCFileMetaV2(self._node.wrong_root_cid or file.root_cid, bucket_name, file_name, size, size)

    @staticmethod
    def _read_chunk(reader):
        data = bytearray(CHUNK)
        have = 0
        while have < CHUNK:
            try:
                n = reader.readinto(memoryview(data)[have:])
                if not n:
                    break
                have += n
            except Exception as e:
                if have == 0:
                    raise SDKError(f"failed to read from reader: {e}")
                break
        return bytes(data[:have])

    def create_file_download(self, ctx, bucket_name, file_name):
        return self.create_range_file_download(ctx, bucket_name, file_name, 0, 1 << 40)

    def create_range_file_download(self, ctx, bucket_name, file_name, start, end):
        try:
            self._call("create_range_file_download")
            file = self._node.buckets[bucket_name][file_name]
        except Exception as e:
            raise SDKError(f"failed to create range file download: {e}")
        chunks = [Chunk(f"c{i}", len(data), len(data), i) for i, data in enumerate(file.chunks)][start:end]
        return IPCFileDownload(bucket_name, file_name, chunks)

    def download(self, ctx, file_download, writer):
        try:
            self._node.entered(1)
            self._call("download")
            if self._config.use_connection_pool:
                self._node.pooled += 1
                time.sleep(0.2)
            for chunk in file_download.chunks:
                self._node.chunks_sent.append((file_download.name, chunk.index))
                writer.write(self._node.buckets[file_download.bucket_name][file_download.name].chunks[chunk.index])
        except Exception as e:
            raise SDKError(f"failed to download file: {e}")
        finally:
            self._node.entered(-1)

    def _call(self, name):
        if self._sdk.closed:
            raise ValueError("Cannot invoke RPC on closed channel!")
        self._node.call(name)
