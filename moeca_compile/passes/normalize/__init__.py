"""Passes that rewrite the exported graph into the forms that matching knows, with the same values; one a file."""
