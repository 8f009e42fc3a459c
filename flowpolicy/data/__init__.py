"""Demonstrations: the store on disk, importers, chunk sampling, normalisation."""
