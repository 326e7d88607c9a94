#!/usr/bin/env python3
"""One upload or download by a client of Python: `store_client.py CLIENT put|get ENDPOINT BUCKET KEY BYTES [CA]`.

Prints one line of JSON: seconds, CPU seconds of this process, and by how many bytes its memory grew. What is uploaded lies in memory; what
is downloaded is put into memory that was there and touched before. Each client makes a small object first, so that modules and
connections are there. Keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""
import hashlib
import io
import json
import mmap
import os
import resource
import sys
import time

PART = 8 << 20
FLOWS = 4


class Boto3:
    def __init__(self, endpoint, bucket, ca):
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        config = Config(s3={"addressing_style": "path"}, max_pool_connections=FLOWS)
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", verify=ca or None, config=config)
        self.bucket = bucket
        self.how = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=FLOWS)

    def put(self, key, data):
        self.client.upload_fileobj(io.BytesIO(data) if len(data) < PART else Reader(data), self.bucket, key, Config=self.how)

    def get(self, key, target):
        self.client.download_fileobj(self.bucket, key, Writer(target), Config=self.how)


class Crt:
    def __init__(self, endpoint, bucket, ca):
        from awscrt import auth, io as crt, s3

        self.s3, self.bucket, self.host = s3, bucket, endpoint.split("://")[1]
        from awscrt import http
        self.http = http
        boot = crt.ClientBootstrap(crt.EventLoopGroup(), crt.DefaultHostResolver(crt.EventLoopGroup()))
        keys = auth.AwsCredentialsProvider.new_static(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        tls = None
        if ca:
            options = crt.TlsContextOptions()
            options.override_default_trust_store_from_path(None, ca)
            tls = crt.ClientTlsContext(options).new_connection_options()
        signing = s3.create_default_s3_signing_config(region="us-east-1", credential_provider=keys)
        mode = s3.S3RequestTlsMode.ENABLED if ca else s3.S3RequestTlsMode.DISABLED
        self.client = s3.S3Client(bootstrap=boot, region="us-east-1", signing_config=signing, part_size=PART, tls_mode=mode,
                                  tls_connection_options=tls, throughput_target_gbps=10)

    def request(self, kind, method, key, body=None, length=None, **more):
        headers = self.http.HttpHeaders([("host", self.host)])
        if body is not None:
            headers.add("content-length", str(length))
        request = self.http.HttpRequest(method, f"/{self.bucket}/{key}", headers, body)
        self.client.make_request(type=kind, request=request, **more).finished_future.result(300)

    def put(self, key, data):
        checksum = self.s3.S3ChecksumConfig(algorithm=self.s3.S3ChecksumAlgorithm.CRC64NVME, location=self.s3.S3ChecksumLocation.TRAILER)
        self.request(self.s3.S3RequestType.PUT_OBJECT, "PUT", key, Reader(data), len(data), checksum_config=checksum)

    def get(self, key, target):
        def place(chunk, offset, **_):
            target[offset:offset + len(chunk)] = chunk
        self.request(self.s3.S3RequestType.GET_OBJECT, "GET", key, on_body=place)


class Torch:
    """The client of s3torchconnector."""

    def __init__(self, endpoint, bucket, ca):
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        del ca                                                   # it takes none, and has that of the machine
        self.client = MountpointS3Client("us-east-1", endpoint=endpoint, force_path_style=True, part_size=PART)
        self.bucket = bucket

    def put(self, key, data):
        stream = self.client.put_object(self.bucket, key)
        view = memoryview(data)
        for at in range(0, len(data), PART):
            stream.write(bytes(view[at:at + PART]))              # it takes `bytes` alone
        stream.close()

    def get(self, key, target):
        at = 0
        for chunk in self.client.get_object(self.bucket, key):
            target[at:at + len(chunk)] = chunk
            at += len(chunk)


class Reader(io.RawIOBase):
    """A file over memory, without a copy of its own."""

    def __init__(self, data):
        self.view, self.at = memoryview(data), 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, len(self.view))[whence]
        return self.at

    def readinto(self, target):
        part = self.view[self.at:self.at + len(target)]
        target[:len(part)] = part
        self.at += len(part)
        return len(part)

    def read(self, size=-1):
        part = bytes(self.view[self.at:self.at + size if size >= 0 else None])
        self.at += len(part)
        return part


class Writer(io.RawIOBase):
    def __init__(self, target):
        self.target, self.at = target, 0

    def writable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = offset
        return offset

    def tell(self):
        return self.at

    def write(self, chunk):
        self.target[self.at:self.at + len(chunk)] = chunk
        self.at += len(chunk)
        return len(chunk)


CLIENTS = {"boto3": Boto3, "awscrt": Crt, "s3torchconnector": Torch}


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def main():
    name, what, endpoint, bucket, key, length, *ca = sys.argv[1:]
    length = int(length)
    client = CLIENTS[name](endpoint, bucket, ca[0] if ca else None)
    data = mmap.mmap(-1, length)
    if what == "put":
        with open("/dev/urandom", "rb") as random:
            for at in range(0, length, 1 << 20):
                data[at:at + (1 << 20)] = random.read(min(1 << 20, length - at))
    else:
        for at in range(0, length, 4096):
            data[at] = 0
    small = bytearray(1 << 20)
    client.put(key + "-small", small)
    client.get(key + "-small", small)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")                                          # VmHWM starts anew
    before, used, start = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    getattr(client, what)(key, data)
    seconds, now = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    found = {"seconds": seconds, "cpu_seconds": cpu, "grew": memory("VmHWM") - before}
    print(json.dumps(found | {"sum": hashlib.blake2b(data, digest_size=8).hexdigest()}))


if __name__ == "__main__":
    main()
