"""Checkpoints of deepmd-kit: reader, writer, names of parameters, options."""
