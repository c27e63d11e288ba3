"""Several nodes on one machine, for `elastic-pt local`, the demo, the chaos tests and the benchmarks."""
