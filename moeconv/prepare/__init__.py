"""MEASURE for upcycle: partitions of FFNs for `split`, and routers from data."""
