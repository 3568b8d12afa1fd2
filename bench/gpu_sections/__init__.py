"""What `bench.gpu` measures, one file a section; each runs on a CPU too, as far as there is something to run."""
