"""Captioned images: the emoji set, folders, tars, parquet files and prepared sets."""
