//! The same requests to `crates/kube-api` and to a real API server, and every difference in what
//! they answer.
//!
//! A [`Server`] is one of the two. [`generate`] makes a sequence of [`Request`]s from a seed alone,
//! so that a part of it can be run again; what only a server knows (revisions, uids, generated
//! names) stands in it as a placeholder. [`normal`] takes out of an answer what may differ.

mod compare;
mod definition;
mod generate;
mod request;
mod server;

pub use compare::{Names, differences, normal};
pub use definition::definition;
pub use generate::{Dice, generate};
pub use request::{Body, Edit, Request};
pub use server::{Answer, Server, Watch};
