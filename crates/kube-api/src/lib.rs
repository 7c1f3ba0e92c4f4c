//! Serving an API in Kubernetes' conventions: discovery, OpenAPI, tables, list and watch, patches, server-side apply.
