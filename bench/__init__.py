"""Benchmarks: one script per question. Results are CSV rows that name the device and versions."""
