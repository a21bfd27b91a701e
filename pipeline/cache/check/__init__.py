"""Is a cache what was written, and how is it mended? It uses stores through the protocol of `format.records`."""
