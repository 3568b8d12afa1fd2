"""Whole diffusers pipelines: their denoisers compiled in place, each call of the pipeline a generation.

Only the pipeline's own objects are used: diffusers is never imported.
"""
