//! krakectl, the command line of the federation, and its typed client.
//!
//! [`client`] talks to any node and goes on with the next when one dies; [`context`] is the file
//! that says which nodes.

pub mod client;
pub mod context;

pub use client::Client;
pub mod manifest;
