"""The operator: choose (select, tiles), launch (launch, *_backend), differentiate (autograd), register (schema)."""
