"""The command line: what would be cached of a model, saved reports, what lies on disk, what it all runs on."""
