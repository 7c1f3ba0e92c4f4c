//! The federation's network on libp2p: identity, membership, reports, failure detection, request and reply.
