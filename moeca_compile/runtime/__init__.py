"""What lives between compiled step calls: the schedule, generations and streams, cache tensors, counters."""
