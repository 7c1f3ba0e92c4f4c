//! krakectl and its client against the node's own kinds and checks, served from memory.
#![expect(clippy::unwrap_used, reason = "a failed set-up must abort the test")]

mod bad_input;
mod client;
mod commands;
mod failover;
mod federation;
