"""A run described in YAML: schema, loading, the DeepSpeed dictionary."""
