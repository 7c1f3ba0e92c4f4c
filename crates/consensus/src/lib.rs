//! Multi-Raft host: replicated key-value groups on disk, linearizable reads, watches.
