"""s3:// and o3://: any server that speaks S3, Akave's O3 gateway among them.

store             objects of a bucket, through obstore; its listings through botocore
upload            large objects in parts; an upload that broke off continues
forked            the same store through botocore, for forked processes, in which obstore would hang
botocore_client   the calls that obstore does not have or gets wrong: listings, parts of uploads, buckets
access            endpoint, region, keys and time-outs of a bucket, and obstore's client for it
errors            obstore's and botocore's exceptions, as the errors of origins
"""
