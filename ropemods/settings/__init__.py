"""Settings: options from flags and YAML, records to and from JSON, files written whole; knows nothing of models."""
