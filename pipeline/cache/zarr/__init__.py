"""The store of Zarr v3 arrays: how chunk files are written, found and read. It imports `format` and `files` alone."""
