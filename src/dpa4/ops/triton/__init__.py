"""Triton kernels for a GPU; importing one of these modules imports Triton."""
