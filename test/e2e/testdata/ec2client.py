"""What the scripts beside this one share: a client of the endpoint that is
their only argument, and ways to check what it says."""

import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

ec2 = boto3.client(
    "ec2",
    endpoint_url=sys.argv[1],
    region_name="us-east-1",
    aws_access_key_id="AKIDTEST",
    aws_secret_access_key="secret",
    config=Config(retries={"max_attempts": 1}),
)
FAST = {"Delay": 0.1, "MaxAttempts": 200}


def wait(name, **kwargs):
    ec2.get_waiter(name).wait(WaiterConfig=FAST, **kwargs)


def until(what, check):
    deadline = time.monotonic() + 20
    while not check():
        if time.monotonic() > deadline:
            raise AssertionError("not in 20 s: " + what)
        time.sleep(0.05)


def refused(code, call, **kwargs):
    try:
        call(**kwargs)
    except ClientError as e:
        assert e.response["Error"]["Code"] == code, e
        return e
    raise AssertionError(f"not refused with {code}")


def equal(got, want):
    assert got == want, f"{got!r} is not {want!r}"


def tagged(kind, **tags):
    return [{"ResourceType": kind, "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}]
