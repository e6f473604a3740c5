"""Compilation of methods of the network: regions, their traces, stages as text, worker processes."""
