"""What every cache consists of, whatever its store: header, commit records, records and their checksum, quantisers.

This folder imports no store. It defines the protocol (`records.Store`) that each store implements.
"""
