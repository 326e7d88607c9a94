#!/usr/bin/env python3
"""Downloads every object below a prefix with boto3: `download.py ENDPOINT BUCKET PREFIX DIRECTORY`."""
import pathlib
import sys

import boto3

endpoint, bucket, prefix, directory = sys.argv[1:]
client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
for found in (found for page in pages for found in page.get("Contents", ())):
    target = pathlib.Path(directory) / found["Key"].removeprefix(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(bucket, found["Key"], str(target))
    print(target)
