"""Scripts that turn public data sets into task folders; run from a checkout: `python -m dataset_conversion.NAME`."""
