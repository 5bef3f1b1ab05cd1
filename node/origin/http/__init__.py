"""https://, and http:// on this machine: any web server, read only.

store      objects under one URL
ranges     reads in ranges, checked; hf:// reads by it too
requests   one request and its answer: connections, redirects, proxies, errors
"""
