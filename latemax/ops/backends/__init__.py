"""One file a backend; ``base.Backend`` is what each of them offers."""
