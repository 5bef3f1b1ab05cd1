"""Encryption on top of any object store: what leaves the machine is encrypted and authenticated.

store    the object store that encrypts and decrypts
frames   the format: AES-256-GCM in frames, so that ranges can be read
keys     the operator's key file, and the keys that are derived from it
"""
