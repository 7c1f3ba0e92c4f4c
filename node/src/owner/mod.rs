//! The owner's side: for every app in a shard that this node leads, decide where it runs and keep
//! its status true.

pub mod controller;
mod effects;
mod news;
pub mod plan;
mod queue;
pub mod status;
