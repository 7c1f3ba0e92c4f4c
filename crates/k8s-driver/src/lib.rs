//! Kubernetes driver: server-side apply, prune, watch, health and drift through kube-rs.
