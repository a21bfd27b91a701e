"""Caches behind a URL: whole shards are fetched into a bounded local folder and read from there.

objects.py   the files below a URL: read in blocks and written, with retries
metadata.py  a cache's header and commit records, wherever they are
folder.py    the local folder: how much it may hold, and which shard goes when it is full
mirror.py    the local copy of one remote cache: its metadata, and the shards that are wanted
ahead.py     a process that fetches shards before they are wanted
copying.py   whole caches, shard by shard, from one place to another
"""
