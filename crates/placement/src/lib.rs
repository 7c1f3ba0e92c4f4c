//! Placement: which site an application runs at. Pure and deterministic: equal inputs, equal
//! decision, byte for byte.
//!
//! [`spec`] checks what a user wrote and fills in defaults, [`needs`] says what the manifests need,
//! [`decide`] filters, scores and chooses, and accounts for every site in a decision record.

pub mod constraint;
pub mod decide;
pub mod needs;
pub mod spec;
