"""Benchmarks: one script a question; results are CSV rows that name device and versions."""
