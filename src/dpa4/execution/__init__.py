"""Execution of a potential: compiled regions, padding, CUDA graphs, precompilation, the evaluator, and all limits."""
