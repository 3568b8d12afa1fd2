"""What a process found out about a model, for the next one: beside Inductor's cache, by its rules."""
