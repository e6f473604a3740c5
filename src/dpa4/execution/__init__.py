"""Ways to run a potential: compiled regions, padding, CUDA graphs, precompilation, the evaluator, and every limit."""
