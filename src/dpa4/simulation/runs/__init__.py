"""Bookkeeping of long runs: results saved one by one, resuming, shards of several processes, progress bars."""
