"""Images in parquet files: listed once, then each read by itself.

files.py     a file's columns, keys and labels
pages.py     where the values of a column lie, and one of them by one read
encoding.py  numbers in runs, Thrift's structs, snappy's blocks
"""
