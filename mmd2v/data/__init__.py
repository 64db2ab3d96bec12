"""Data: packing into shards, streaming them, tokens, transforms, and a generated world."""
