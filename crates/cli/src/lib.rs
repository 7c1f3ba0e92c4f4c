//! krakectl, the command line of the federation, and its typed client.
//!
//! [`client`] talks to any node and goes on with the next when one dies; [`context`] is the file
//! that says which nodes.

mod cli;
pub mod client;
pub mod context;
mod manifest;

pub use cli::main;
pub use client::Client;
