"""Bookkeeping of long runs: parts, records, shards, progress."""
