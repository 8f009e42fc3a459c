"""Demonstrations: on disk, in memory, and as the batches that a policy is trained on.

In the order in which a demonstration passes through:

- ``importers``: files of other projects, brought into a store.
- ``store``: :class:`~flowpolicy.data.store.Demonstrations`, read and written; ``keys`` names what a store
  holds, ``features`` says what a column is.
- ``zarr_reading``, ``zarr_checks``, ``store_writing``: the store on disk, the damage that zarr overlooks, and
  a writer that leaves a whole store or nothing; ``image_codecs`` for its images.
- ``inspection``: what is in it. ``robomimic_writing``: given back as a robomimic file.
- ``normalization``, ``sampling``, ``prefetch``: physical units to normalised ones, episodes to chunks, chunks
  ahead of time.

``causes``, ``memory``, ``rounding`` and ``versions`` say why a file cannot be read, what memory is free, what
float32 takes away, and whether the simulator is the one that recorded.
"""
