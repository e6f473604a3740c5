"""From a method of the network to compiled code: regions, their traces, stages as text, worker processes."""
