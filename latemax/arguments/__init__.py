"""Arguments of the public functions: validated, and brought into the one form that ``latemax.ops`` takes."""
