"""`arrange`: a new order of the experts, for serving them in equal contiguous shares on several devices."""
