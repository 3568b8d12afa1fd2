"""Rewrite the exported graph into the forms that matching knows; values stay the same. One pass a file."""
