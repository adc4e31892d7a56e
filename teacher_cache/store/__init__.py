"""The cache on disk or in an object store: shards, ledger, manifest, locks, readers."""
