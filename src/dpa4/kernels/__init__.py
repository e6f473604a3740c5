"""Operators with fast kernels: each is a torch operator with a plain twin, and its derivatives are such operators."""
