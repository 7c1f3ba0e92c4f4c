//! The site's side: runs what is assigned to it, reports what becomes of it, promises capacity.

pub mod agent;
pub mod ledger;
pub mod report;
pub mod reservations;
