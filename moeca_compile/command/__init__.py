"""The command line: `moeca explain` says what would be cached of a model, `moeca env` what it runs on."""
