"""Triton kernels for GPUs. Importing a module of this package imports Triton.

Modules and functions have the names of the operators they implement. Their arguments and results are those of the
plain versions, without derivatives.
"""
