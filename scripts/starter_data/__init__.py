"""Parts of make_starter_data.py: enumeration, geometries, sampling and labels, storage, data card."""
