"""What runs compiled steps: the step loop, the schedule, generations and streams with their caches, counters."""
