"""Activation stores: recordings of any number of runs on disk, in safetensors shards, read lazily."""
